// Threads for the length of a call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

namespace opsd {

// Runs work() on `count` threads, this one among them. For each that the system does not give it calls missing(): fewer
// threads do it too.
template <class Work, class Missing>
static void on_threads(int64_t count, const Work& work, const Missing& missing) {
    std::vector<std::thread> others;
    others.reserve(size_t(std::max<int64_t>(count, 1)));
    for (int64_t i = 1; i < count; ++i) {
        try {
            others.emplace_back(std::cref(work));
        } catch (const std::system_error&) {
            missing();
        }
    }
    work();
    for (std::thread& other : others) other.join();
}

}  // namespace opsd
