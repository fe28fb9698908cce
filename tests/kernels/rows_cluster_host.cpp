// The cluster kernel's row, on the host: the same functions for an entry, a part, the joining of parts and the token,
// in the same order: lanes within a warp, warps within a block, blocks of a cluster. What it leaves out is what only a
// device has: copies, barriers and shuffles.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "requests.h"
#include "row_parts.h"

namespace {

using namespace opsd;
constexpr int LANES_OF_WARP = 32, WARPS_OF_BLOCK = 8, QUADS_AT_ONCE = 64;

struct Row {
    const float* student;
    const float* teacher;
    int64_t vocab;
    Tempering how;
    Measure measure;
};

template <class Item, class Join>
Item tree(std::vector<Item> items, const Join& join) {  // as a butterfly of shuffles does it in lane 0
    for (size_t distance = 1; distance < items.size(); distance *= 2)
        for (size_t i = 0; i + distance < items.size(); i += 2 * distance) items[i] = join(items[i], items[i + distance]);
    return items[0];
}

template <int BETA, bool TRANSFORMED>
Logits at(const Row& row, int64_t column, float centre = 0.0f) {
    const bool there = column < row.vocab;
    const float student = there ? row.student[column] : -INF, teacher = there ? row.teacher[column] : -INF;
    return logits_of<BETA, TRANSFORMED>(student, teacher, row.how, centre);
}

template <int BETA, bool TRANSFORMED>
Part part_of(const Row& row, Slice slice) {
    const float bits = row.how.bits;
    Running student[LANES_OF_WARP], teacher[LANES_OF_WARP];
    for (int first = 0; first < slice.count; first += QUADS_AT_ONCE)
        for (int lane = 0; lane < LANES_OF_WARP; ++lane) {
            float y_s[8], y_t[8];
            for (int i = 0; i < 8; ++i) {
                const int quad = first + i / 4 * 32 + lane;
                y_s[i] = y_t[i] = -INF;
                if (quad >= slice.count) continue;
                const Logits x = at<BETA, TRANSFORMED>(row, 4 * int64_t(slice.first + quad) + i % 4);
                y_s[i] = x.y_s, y_t[i] = x.y_t;
            }
            student[lane].add(y_s, bits);
            teacher[lane].add(y_t, bits);
        }
    Part part;
    for (int lane = 0; lane < LANES_OF_WARP; ++lane) {
        part.high_s = larger(part.high_s, student[lane].high);
        part.high_t = larger(part.high_t, teacher[lane].high);
    }
    std::vector<float> own_s, own_t;
    for (int lane = 0; lane < LANES_OF_WARP; ++lane) {
        own_s.push_back(student[lane].scaled_to(part.high_s, bits));
        own_t.push_back(teacher[lane].scaled_to(part.high_t, bits));
    }
    const auto sum = [](float x, float y) { return x + y; };
    part.rest_s = tree(own_s, sum), part.rest_t = tree(own_t, sum);
    if (!wants_top(part)) return part;
    int owner = 0;
    while (student[owner].high != part.high_s) ++owner;
    Part again = part;
    again.rest_s = again.rest_t = 0;
    for (int quad = owner; quad < slice.count; quad += LANES_OF_WARP)
        for (int i = 0; i < 4; ++i) {
            const int64_t column = 4 * int64_t(slice.first + quad) + i;
            const Logits x = at<BETA, TRANSFORMED>(row, column);
            if (part.top < 0 && x.y_s == part.high_s) {
                part.top = int(column), part.at_top = x.y_t, part.gap_at_top = x.gap;
            } else {
                add_rest(again, x.y_s, x.y_t, bits);
            }
        }
    own_s[size_t(owner)] = again.rest_s, own_t[size_t(owner)] = again.rest_t;
    part.rest_s = tree(own_s, sum), part.rest_t = tree(own_t, sum);
    return part;
}

Totals added(const Totals& x, const Totals& y) {
    Totals out;
    for (int i = 0; i < Totals::COUNT; ++i) out.sum[i] = x.sum[i] + y.sum[i];
    return out;
}

template <int BETA, bool CLIP, bool TRANSFORMED>
void row_of(const DivergenceRequest& r, int64_t index, int blocks, Tempering how, Measure measure) {
    const Row row{r.student + index * r.student_stride, r.teacher + index * r.teacher_stride, r.vocab, how, measure};
    const int workers = blocks * WARPS_OF_BLOCK;
    std::vector<Part> parts;
    for (int block = 0; block < blocks; ++block) {
        std::vector<Part> warps;
        for (int warp = 0; warp < WARPS_OF_BLOCK; ++warp)
            warps.push_back(
                part_of<BETA, TRANSFORMED>(row, slice_of(r.vocab, workers, block * WARPS_OF_BLOCK + warp))
            );
        parts.push_back(tree(warps, [&](const Part& x, const Part& y) { return merged(x, y, how.bits); }));
    }
    const Part whole = tree(parts, [&](const Part& x, const Part& y) { return merged(x, y, how.bits); });
    const Norms norms = settled<BETA, CLIP, TRANSFORMED>(whole, how, measure);
    float* column = r.table + index;
    if (r.targets) {
        const Logits x = at<BETA, TRANSFORMED>(row, r.targets[index]);
        column[STUDENT_LOGPROB * r.table_stride] = (x.y_s * how.bits - norms.log_s) * LN2;
        column[TEACHER_LOGPROB * r.table_stride] = (x.y_t * how.bits - norms.log_t) * LN2;
    }
    std::vector<Direction> directions(size_t(4 * quads_of(r.vocab)));
    std::vector<Totals> sums;
    for (int block = 0; block < blocks; ++block) {
        std::vector<Totals> warps;
        for (int warp = 0; warp < WARPS_OF_BLOCK; ++warp) {
            const Slice slice = slice_of(r.vocab, workers, block * WARPS_OF_BLOCK + warp);
            std::vector<Totals> lanes(LANES_OF_WARP);
            for (int quad = 0; quad < slice.count; ++quad)
                for (int i = 0; i < 4; ++i) {
                    const int64_t here = 4 * int64_t(slice.first + quad) + i;
                    Totals& totals = lanes[size_t(quad % LANES_OF_WARP)];
                    Direction& direction = directions[size_t(here)];
                    const Logits x = at<BETA, TRANSFORMED>(row, here, norms.centre);
                    direction = measured<BETA, CLIP, true>(x, norms, how, measure, totals);
                }
            for (int quad = 0; quad < slice.count; ++quad)
                if (norms.top >= 0 && norms.top / 4 == slice.first + quad) {
                    float& g = directions[size_t(norms.top)].g;
                    lanes[size_t(quad % LANES_OF_WARP)].sum[Totals::DIRECTION] -= g;
                    g *= 0.0f;
                }
            warps.push_back(tree(lanes, added));
        }
        sums.push_back(tree(warps, added));
    }
    const Totals totals = tree(sums, added);
    const Token<float> token = token_of_row<CLIP>(totals, norms, measure, float(r.token_clip));
    column[LOSS * r.table_stride] = token.loss;
    column[DIVERGENCE * r.table_stride] = token.divergence;
    column[STUDENT_ENTROPY * r.table_stride] = norms.no_s ? 0.0f : totals.sum[Totals::ENTROPY_S] * LN2;
    column[TEACHER_ENTROPY * r.table_stride] = norms.no_t ? 0.0f : totals.sum[Totals::ENTROPY_T] * LN2;
    column[ENTRY_CLIPPED * r.table_stride] = norms.live() && totals.sum[Totals::OVER] > 0.0f;
    column[CLIPPED_AMOUNT * r.table_stride] = token.amount;
    column[TOKEN_CLIPPED * r.table_stride] = token.over;
    float* dz = static_cast<float*>(r.dz) + index * r.dz_stride;
    const float weight = float(r.student_transform.scale / r.temperature) * (r.row_scale ? r.row_scale[index] : 1.0f);
    for (int64_t i = 0; i < r.vocab; ++i)
        dz[i] = token.kept ? gradient(directions[size_t(i)], weight, totals.sum[Totals::DIRECTION] * weight) : 0.0f;
}

using RowOf = void (*)(const DivergenceRequest&, int64_t, int, Tempering, Measure);
template <int BETA>
RowOf choose(bool clip, bool transformed) {
    if (clip) return transformed ? row_of<BETA, true, true> : row_of<BETA, true, false>;
    return transformed ? row_of<BETA, false, true> : row_of<BETA, false, false>;
}

}  // namespace

// float32 dz, all columns of the table.
extern "C" void cluster_rows_on_host(const DivergenceRequest* request, int blocks) {
    const DivergenceRequest& r = *request;
    const RowMeaning meaning = meaning_of(r);
    const bool clip = r.entry_clip < double(INF);
    const RowOf row = r.beta == 0   ? choose<FORWARD>(clip, meaning.transformed)
                      : r.beta == 1 ? choose<REVERSE>(clip, meaning.transformed)
                                    : choose<MIXTURE>(clip, meaning.transformed);
    for (int64_t i = 0; i < r.n; ++i) row(r, i, blocks, meaning.tempering, meaning.measure);
}
