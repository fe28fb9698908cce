// What Python asks of the row pass over the whole vocabulary, for host and device.
#pragma once

#include <cstdint>

namespace opsd {

enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Transform {
    double scale;
    double softcap;  // 0: none
};

// Mirrored field by field by opsd_kernels/rows/native_backend.py.
struct DivergenceRequest {
    const float* student;
    const float* teacher;
    const int64_t* targets;  // or null
    const float* row_scale;  // or null
    float* table;            // (columns, n), rows table_stride apart
    void* dz;                // or null
    int64_t n, vocab;
    int64_t student_stride, teacher_stride, dz_stride, table_stride;  // in elements
    double beta, temperature;
    double entry_clip, token_clip;  // infinity: none
    Transform student_transform, teacher_transform;
    int32_t dz_type, statistics, threads;
};

// Rows of the table.
enum Column {
    LOSS,
    DIVERGENCE,
    STUDENT_ENTROPY,
    TEACHER_ENTROPY,
    ENTRY_CLIPPED,
    CLIPPED_AMOUNT,
    TOKEN_CLIPPED,
    STUDENT_LOGPROB,
    TEACHER_LOGPROB
};

}  // namespace opsd
