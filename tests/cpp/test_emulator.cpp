// The emulator runs right kernels rightly under every schedule, and reports wrong ones.
#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#define WITH_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WITH_ADDRESS_SANITIZER
#endif
#endif

namespace {

using namespace test_kernels;
using specbranch::Launch;
using specbranch::cuda::launch;
namespace emulator = specbranch::emulator;

const Launch on;

std::vector<std::string> all_schedules() {
  std::vector<std::string> schedules{"forward", "reverse"};
  for (int seed = 0; seed < 8; ++seed) schedules.push_back("shuffle:" + std::to_string(seed));
  return schedules;
}

// Runs under every schedule, with one and with three OS threads.
template <typename Run>
void under_all_schedules(Run run) {
  for (int threads : {1, 3}) {
    emulator::set_threads(threads);
    for (const std::string& schedule : all_schedules()) {
      emulator::set_schedule(schedule);
      try {
        run();
      } catch (const std::exception& error) {
        throw std::logic_error(schedule + ": " + error.what());
      }
    }
  }
  emulator::set_threads(0);
  emulator::set_schedule("");
}

// How many schedules give another result than `right`.
template <typename Run, typename Result>
int wrong_results(Run run, const Result& right) {
  int wrong = 0;
  emulator::set_threads(1);
  for (const std::string& schedule : all_schedules()) {
    emulator::set_schedule(schedule);
    wrong += run() != right;
  }
  emulator::set_threads(0);
  emulator::set_schedule("");
  return wrong;
}

template <typename Run>
void reported_under_all_schedules(const char* kernel, const char* what, Run run) {
  under_all_schedules([&] {
    const std::string error = check::error_of(run);
    CHECK_CONTAINS(error, std::string(kernel) + ": block (");
    CHECK_CONTAINS(error, what);
    CHECK_CONTAINS(error, "kernels.h:");
  });
}

constexpr int blocks = 37, threads = 256;

std::vector<unsigned> numbers() {
  std::vector<unsigned> x(blocks * threads);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<unsigned>(i) * 2654435761u >> 20;
  return x;
}

std::vector<unsigned> sums_of_blocks(const std::vector<unsigned>& x) {
  std::vector<unsigned> sums;
  for (int b = 0; b < blocks; ++b) {
    sums.push_back(std::accumulate(x.begin() + b * threads, x.begin() + (b + 1) * threads, 0u));
  }
  return sums;
}

template <bool barrier>
std::vector<unsigned> run_block_sum(const std::vector<unsigned>& x) {
  std::vector<unsigned> out(blocks, 0);
  launch("block_sum", block_sum<barrier>, on, dim3(blocks), dim3(threads), threads * sizeof(unsigned), x.data(),
         out.data());
  return out;
}

template <bool barrier>
std::vector<unsigned> run_shuffle_sum(const std::vector<unsigned>& x) {
  std::vector<unsigned> out(blocks, 0);
  launch("shuffle_sum", shuffle_sum<barrier>, on, dim3(blocks), dim3(threads), threads / warp_size * sizeof(unsigned),
         x.data(), out.data());
  return out;
}

template <bool barrier>
long long run_last_block_sum(const std::vector<unsigned>& x) {
  std::vector<unsigned> partial(x.size(), 1000000);
  unsigned tickets = 0;
  long long out = -1;
  launch("last_block_sum", last_block_sum<barrier>, on, dim3(blocks), dim3(threads), sizeof(unsigned), x.data(),
         partial.data(), &tickets, &out);
  CHECK_EQUAL(tickets, 0u);
  return out;
}

}  // namespace

// ---- Right kernels.

TEST(block_reduction) {
  const std::vector<unsigned> x = numbers(), right = sums_of_blocks(x);
  under_all_schedules([&] { CHECK(run_block_sum<true>(x) == right); });
}

TEST(warp_reduction) {
  const std::vector<unsigned> x = numbers(), right = sums_of_blocks(x);
  under_all_schedules([&] { CHECK(run_shuffle_sum<true>(x) == right); });
}

TEST(last_block) {
  const std::vector<unsigned> x = numbers();
  const long long right = std::accumulate(x.begin(), x.end(), 0ll);
  under_all_schedules([&] { CHECK_EQUAL(run_last_block_sum<true>(x), right); });
}

TEST(atomics_of_all_blocks) {
  const int n = blocks * threads;
  under_all_schedules([&] {
    AtomicResults r{};
    r.min_unsigned = ~0u;
    r.min_long = ~0ull;
    launch("atomics", atomics, on, dim3(blocks), dim3(threads), 0, &r);
    const int sum = n * (n - 1) / 2;
    CHECK_EQUAL(r.add_int, -sum);
    CHECK_EQUAL(r.max_int, n - 1);
    CHECK_EQUAL(r.min_int, 1 - n);
    CHECK_EQUAL(r.add_unsigned, static_cast<unsigned>(sum));
    CHECK_EQUAL(r.max_unsigned, static_cast<unsigned>(n - 1));
    CHECK_EQUAL(r.min_unsigned, 1000000u - (n - 1));
    CHECK_EQUAL(r.or_unsigned, ~0u);
    CHECK_EQUAL(r.add_long, static_cast<unsigned long long>(n) << 33);
    CHECK_EQUAL(r.max_long, (1ull << 40) + n - 1);
    CHECK_EQUAL(r.min_long, (1ull << 40) - (n - 1));
    CHECK_EQUAL(r.add_float, static_cast<float>(n));
    CHECK_EQUAL(r.cas_unsigned, 2u * n);
    CHECK_EQUAL(r.exchanges + r.exchange_slot, static_cast<unsigned>(sum + n));
  });
}

TEST(warp_functions_follow_cuda) {
  for (int width : {1, 2, 4, 8, 16, 32}) {
    under_all_schedules([&] {
      std::vector<int> out(96 * warp_results, -1);
      launch("warp_functions", warp_functions, on, dim3(1), dim3(96), 0, width, out.data());
      for (int t = 0; t < 96; ++t) {
        const int lane = t % 32, first = lane / width * width;
        const int* got = out.data() + t * warp_results;
        CHECK_EQUAL(got[0], 100 + first + (lane + 5) % width);
        CHECK_EQUAL(got[1], 100 + (lane - 3 >= first ? lane - 3 : lane));
        CHECK_EQUAL(got[2], 100 + (lane + 3 < first + width ? lane + 3 : lane));
        CHECK_EQUAL(got[3], 100 + ((lane ^ 6) < first + width ? lane ^ 6 : lane));
        CHECK_EQUAL(got[4], 0x49249249);
        CHECK_EQUAL(got[5], 1);
        CHECK_EQUAL(got[6], 2);
        CHECK_EQUAL(got[7], lane < 16 ? lane ^ 1 : -(lane ^ 2));
        CHECK_EQUAL(got[8], 7 + 9);
      }
    });
  }
}

TEST(exchange_and_compute) {
  struct Big {
    int lane;
    char filling[60];
  };
  under_all_schedules([&] {
    std::vector<int> sums(64, -1), maxima(64, -1);
    emulator::launch("exchange", dim3(1), dim3(64), 0, [&] {
      const int lane = emulator::lane();
      const unsigned mask = lane % 2 == 0 ? 0x55555555u : 0xAAAAAAAAu;
      Big mine{lane + 1, {}}, all[32];
      emulator::warp_exchange(mask, &mine, sizeof mine, all);
      int sum = 0;
      for (const Big& big : all) sum += big.lane;
      sums[threadIdx.x] = sum;
      maxima[threadIdx.x] = emulator::warp_compute<int>(mask, mine, [](const Big(&in)[32], int (&out)[32]) {
        int maximum = 0;
        for (const Big& big : in) maximum = std::max(maximum, big.lane);
        for (int i = 0; i < 32; ++i) out[i] = 100 * i + maximum;
      });
    });
    for (int t = 0; t < 64; ++t) {
      CHECK_EQUAL(sums[t], t % 2 == 0 ? 256 : 272);
      CHECK_EQUAL(maxima[t], 100 * (t % 32) + (t % 2 == 0 ? 31 : 32));
    }
  });
}

TEST(grids_and_blocks_of_three_dimensions) {
  const dim3 grid(3, 4, 5), block(5, 3, 4);
  under_all_schedules([&] {
    std::vector<unsigned> out(60 * 60);
    launch("indices", indices, on, grid, block, 0, out.data());
    size_t i = 0;
    for (unsigned bz = 0; bz < grid.z; ++bz)
      for (unsigned by = 0; by < grid.y; ++by)
        for (unsigned bx = 0; bx < grid.x; ++bx)
          for (unsigned tz = 0; tz < block.z; ++tz)
            for (unsigned ty = 0; ty < block.y; ++ty)
              for (unsigned tx = 0; tx < block.x; ++tx) {
                CHECK_EQUAL(out[i++], bx + by * 10 + bz * 100 + tx * 1000 + ty * 100000 + tz * 10000000);
              }
  });
}

TEST(serial_numbers_are_never_used_twice) {
  std::set<uint64_t> serials;
  under_all_schedules([&] {
    std::vector<uint64_t> mine(10 * 64);
    emulator::launch("serials", dim3(10), dim3(64), 0, [&] {
      const uint64_t before = emulator::thread_serial();
      __syncthreads();
      mine[blockIdx.x * 64 + threadIdx.x] = before == emulator::thread_serial() ? before : 0;
    });
    for (uint64_t serial : mine) CHECK(serial != 0 && serials.insert(serial).second);
  });
}

TEST(block_orders) {
  const auto order_of = [](const std::string& schedule, unsigned n) {
    emulator::set_schedule(schedule);
    emulator::set_threads(1);
    std::vector<unsigned> order;
    emulator::launch("order", dim3(n), dim3(1), 0, [&] { order.push_back(blockIdx.x); });
    emulator::set_threads(0);
    emulator::set_schedule("");
    return order;
  };
  std::vector<unsigned> up(100);
  std::iota(up.begin(), up.end(), 0u);
  const std::vector<unsigned> down(up.rbegin(), up.rend());
  CHECK(order_of("forward", 100) == up);
  CHECK(order_of("reverse", 100) == down);
  std::set<std::vector<unsigned>> orders;
  for (int seed = 0; seed < 20; ++seed) {
    const std::string schedule = "shuffle:" + std::to_string(seed);
    std::vector<unsigned> order = order_of(schedule, 100);
    CHECK(order == order_of(schedule, 100));  // the same again
    orders.insert(order);
    std::sort(order.begin(), order.end());
    CHECK(order == up);
  }
  CHECK(orders.size() > 15);
}

TEST(shared_memory_is_poisoned) {
  constexpr int words = 5000;
  under_all_schedules([&] {
    std::vector<unsigned> out(4 * words);
    launch("initial_shared_memory", initial_shared_memory, on, dim3(4), dim3(64), words * sizeof(unsigned), words,
           out.data());
    for (size_t i = 0; i < out.size(); ++i) {
      CHECK(std::isnan(__uint_as_float(out[i])));
      CHECK(std::isnan(__half2float(__ushort_as_half(static_cast<unsigned short>(out[i])))));
      CHECK(std::isnan(__half2float(__ushort_as_half(static_cast<unsigned short>(out[i] >> 16)))));
      CHECK(std::isnan(__uint_as_float(out[i] << 16)));  // as bfloat16
    }
    CHECK(out[0] != out[words]);  // not the same in every block
  });
}

TEST(stacks_are_deep_enough) {
  under_all_schedules([&] {
    std::vector<int> out(1024);
    launch("deep_stacks", deep_stacks, on, dim3(1), dim3(1024), 0, out.data());
    for (int t = 0; t < 1024; ++t) CHECK_EQUAL(out[t], 2048 * t + 2047 * 1024);
  });
}

// ---- Wrong kernels: wrong results under some schedule.

TEST(missing_barrier_is_seen) {
  const std::vector<unsigned> x = numbers(), right = sums_of_blocks(x);
  CHECK(wrong_results([&] { return run_block_sum<false>(x); }, right) >= 1);
  CHECK(wrong_results([&] { return run_shuffle_sum<false>(x); }, right) >= 1);
}

TEST(early_ticket_is_seen) {
  const std::vector<unsigned> x = numbers();
  CHECK(wrong_results([&] { return run_last_block_sum<false>(x); }, std::accumulate(x.begin(), x.end(), 0ll)) >= 1);
}

// ---- Wrong kernels: errors that name the place.

TEST(exit_before_barrier_is_reported) {
  int out[256];
  reported_under_all_schedules("exit_before_barrier", "waits for thread (5, 0, 0), which has exited", [&] {
    launch("exit_before_barrier", exit_before_barrier, on, dim3(1), dim3(256), 0, out);
  });
}

TEST(divergent_barrier_is_reported) {
  int out[256];
  reported_under_all_schedules("divergent_barrier", "divergent __syncthreads",
                               [&] { launch("divergent_barrier", divergent_barrier, on, dim3(1), dim3(256), 0, out); });
}

TEST(barrier_against_shuffle_is_reported) {
  int out[64];
  reported_under_all_schedules("barrier_against_shuffle", "which waits in __syncthreads", [&] {
    launch("barrier_against_shuffle", barrier_against_shuffle, on, dim3(1), dim3(64), 0, out);
  });
}

TEST(shuffle_from_inactive_lane_is_reported) {
  int out[32];
  reported_under_all_schedules("inactive", "source lane 20 is not in mask 0x0000ffff",
                               [&] { launch("inactive", shuffle_from_inactive_lane, on, dim3(1), dim3(32), 0, out); });
}

TEST(caller_outside_of_mask_is_reported) {
  int out[32];
  reported_under_all_schedules("outside", "the calling lane is not in its mask",
                               [&] { launch("outside", shuffle_outside_of_mask, on, dim3(1), dim3(32), 0, out); });
}

TEST(exited_lane_in_mask_is_reported) {
  int out[32];
  reported_under_all_schedules("exited", "waits for lane 7, which has exited",
                               [&] { launch("exited", shuffle_with_exited_lane, on, dim3(1), dim3(32), 0, out); });
}

TEST(lane_that_the_block_lacks_is_reported) {
  int out[96 * warp_results];
  reported_under_all_schedules("partial", "waits for lane 16, which the block does not have",
                               [&] { launch("partial", warp_functions, on, dim3(1), dim3(48), 0, 32, out); });
}

TEST(shuffles_at_two_places_are_reported) {
  int out[32];
  reported_under_all_schedules("two_places", "which waits in __shfl_",
                               [&] { launch("two_places", shuffle_at_two_places, on, dim3(1), dim3(32), 0, out); });
}

TEST(odd_width_is_reported) {
  int out[32];
  reported_under_all_schedules("width", "width 12 is not a power of two",
                               [&] { launch("width", shuffle_odd_width, on, dim3(1), dim3(32), 0, out); });
}

TEST(the_right_line_is_reported) {
  emulator::set_schedule("forward");
  const int line = __LINE__ + 2;
  const auto kernel = [] {
    if (threadIdx.x != 0) __syncthreads();
  };
  const std::string error = check::error_of([&] { emulator::launch("lines", dim3(7, 2), dim3(4, 8), 0, kernel); });
  emulator::set_schedule("");
  CHECK_CONTAINS(error, "lines: block (0, 0, 0), thread (1, 0, 0): __syncthreads");
  CHECK_CONTAINS(error, "test_emulator.cpp:" + std::to_string(line) + " waits for thread (0, 0, 0), which has exited");
}

TEST(exceptions_leave_launch) {
  under_all_schedules([&] {
    const std::string error = check::error_of([] {
      emulator::launch("throws", dim3(5), dim3(64), 0, [] {
        __syncthreads();
        if (blockIdx.x == 2 && threadIdx.x == 9) throw std::out_of_range("nine");
        __syncthreads();
      });
    });
    CHECK_CONTAINS(error, "throws: block (2, 0, 0), thread (9, 0, 0): exception: nine");
  });
  // What was left behind does not disturb the next launch.
  const std::vector<unsigned> x = numbers();
  CHECK(run_block_sum<true>(x) == sums_of_blocks(x));
}

TEST(impossible_launches_are_refused) {
  const auto error = [](dim3 grid, dim3 block, size_t bytes) {
    return check::error_of([&] { emulator::launch("empty", grid, block, bytes, [] {}); });
  };
  CHECK_EQUAL(error(dim3(1), dim3(1024), 227 * 1024), "");
  CHECK_EQUAL(error(dim3(1), dim3(2, 8, 64), 0), "");
  CHECK_CONTAINS(error(dim3(0), dim3(32), 0), "empty: cannot launch a grid of (0, 1, 1) blocks");
  CHECK_CONTAINS(error(dim3(1, 65536), dim3(32), 0), "cannot launch");
  CHECK_CONTAINS(error(dim3(1), dim3(1025), 0), "cannot launch");
  CHECK_CONTAINS(error(dim3(1), dim3(32, 33), 0), "cannot launch");
  CHECK_CONTAINS(error(dim3(1), dim3(0), 0), "cannot launch");
  CHECK_CONTAINS(error(dim3(1), dim3(1, 1, 65), 0), "cannot launch");
  CHECK_CONTAINS(error(dim3(1), dim3(32), 227 * 1024 + 1), "bytes of shared memory");
  CHECK_CONTAINS(check::error_of([] { __syncthreads(); }), "outside of a kernel");
  CHECK_CONTAINS(check::error_of([] {
                   emulator::launch("outer", dim3(1), dim3(1), 0,
                                    [] { emulator::launch("inner", dim3(1), dim3(1), 0, [] {}); });
                 }),
                 "inner: launched from a kernel");
}

TEST(launches_are_counted) {
  const uint64_t before = emulator::launches();
  emulator::launch("empty", dim3(3), dim3(32), 0, [] {});
  check::error_of([] { emulator::launch("refused", dim3(0), dim3(32), 0, [] {}); });
  CHECK_EQUAL(emulator::launches(), before + 1);
}

TEST(settings_are_checked) {
  for (const char* text : {"backward", "shuffle", "shuffle:", "shuffle:x", "shuffle:-1", "forward "}) {
    bool refused = false;
    try {
      emulator::set_schedule(text);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
  setenv("SPECBRANCH_EMULATOR_SCHEDULE", "reverse", 1);
  CHECK_EQUAL(emulator::schedule(), "reverse");
  emulator::set_schedule("shuffle:12");
  CHECK_EQUAL(emulator::schedule(), "shuffle:12");
  emulator::set_schedule("");
  unsetenv("SPECBRANCH_EMULATOR_SCHEDULE");
  CHECK_EQUAL(emulator::schedule(), "shuffle:0");
}

#ifndef WITH_ADDRESS_SANITIZER
TEST(writing_past_shared_memory_is_reported) {
  for (int words : {64, 96, 127}) {
    under_all_schedules([&] {
      CHECK_CONTAINS(check::error_of([&] {
                       launch("past", write_past_shared_memory, on, dim3(3), dim3(64), words * sizeof(int), words);
                     }),
                     "written past the " + std::to_string(words * sizeof(int)) + " bytes of shared memory");
    });
  }
}
#endif

int main(int argc, char** argv) {
  // With a sanitizer these end the process; CMakeLists.txt runs them and looks for its message.
  if (argc == 2 && std::string(argv[1]) == "--read-past-shared-memory") {
    int out = 0;
    launch("read_past", read_past_shared_memory, on, dim3(1), dim3(64), 64 * sizeof(int), 64, &out);
    return out == 12345;
  }
  if (argc == 2 && std::string(argv[1]) == "--misaligned-vector") {
    alignas(16) float x[8] = {};
    float out[32];
    launch("misaligned", misaligned_vector, on, dim3(1), dim3(32), 0, x + 1, out);
    return out[0] == 12345.0f;
  }
  return check::main(argc, argv);
}
