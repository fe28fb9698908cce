// Threads for the length of a call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <new>
#include <thread>
#include <vector>

namespace opsd {

enum Outcome { DONE = 0, OUT_OF_MEMORY = 1 };  // what the library's functions return

// Runs work() on `count` threads, this one among them. For each that the system does not give it calls missing(): fewer
// threads do it too. `work` throws nothing.
template <class Work, class Missing>
static Outcome on_threads(int64_t count, const Work& work, const Missing& missing) {
    std::vector<std::thread> others;
    try {
        others.reserve(size_t(std::max<int64_t>(count, 1)));
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
    for (int64_t i = 1; i < count; ++i) {
        try {
            others.emplace_back(std::cref(work));
        } catch (const std::exception&) {  // no thread, or no memory for one
            missing();
        }
    }
    work();
    for (std::thread& other : others) other.join();
    return DONE;
}

}  // namespace opsd
