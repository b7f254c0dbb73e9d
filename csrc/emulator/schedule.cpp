#include "schedule.h"

#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "emulator.h"

namespace specbranch::emulator {
namespace {

int parse_threads(const std::string& text) {
  if (text.empty()) return 2;
  if (text.size() > 3 || text.find_first_not_of("0123456789") != std::string::npos || std::stoi(text) < 1) {
    throw std::invalid_argument("SPECBRANCH_EMULATOR_THREADS: expected 1 to 999, got " + text);
  }
  return std::stoi(text);
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

struct Settings {
  std::mutex mutex;
  std::string schedule;
  int threads = 0;
};

Settings& settings() {
  static Settings settings;
  return settings;
}

}  // namespace

Schedule parse_schedule(const std::string& text) {
  if (text.empty()) return {};
  if (text == "forward") return {Order::forward, 0};
  if (text == "reverse") return {Order::reverse, 0};
  const std::string prefix = "shuffle:";
  const std::string digits = text.compare(0, prefix.size(), prefix) == 0 ? text.substr(prefix.size()) : "";
  if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos) {
    throw std::invalid_argument("emulator schedule: expected forward, reverse or shuffle:SEED, got " + text);
  }
  return {Order::shuffle, std::stoull(digits)};
}

uint64_t hash_text(const char* text) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (; *text != '\0'; ++text) hash = (hash ^ static_cast<unsigned char>(*text)) * 1099511628211u;
  return hash;
}

void set_schedule(const std::string& schedule) {
  parse_schedule(schedule);
  const std::lock_guard<std::mutex> lock(settings().mutex);
  settings().schedule = schedule;
}

std::string schedule() {
  std::string text;
  {
    const std::lock_guard<std::mutex> lock(settings().mutex);
    text = settings().schedule;
  }
  if (text.empty()) text = environment("SPECBRANCH_EMULATOR_SCHEDULE");
  return text.empty() ? "shuffle:0" : text;
}

void set_threads(int threads) {
  if (threads < 0) throw std::invalid_argument("set_threads: expected 0 or more, got " + std::to_string(threads));
  const std::lock_guard<std::mutex> lock(settings().mutex);
  settings().threads = threads;
}

int thread_count() {
  {
    const std::lock_guard<std::mutex> lock(settings().mutex);
    if (settings().threads != 0) return settings().threads;
  }
  return parse_threads(environment("SPECBRANCH_EMULATOR_THREADS"));
}

}  // namespace specbranch::emulator
