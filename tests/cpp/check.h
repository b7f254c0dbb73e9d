// The few lines that the C++ tests need: TEST(name) { CHECK(…); }, and a main() that runs all or the named ones.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> tests;
  return tests;
}

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw std::logic_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <typename A, typename B>
void equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream what;
  what << text << ": " << a << " and " << b;
  fail(file, line, what.str());
}

// The message of the std::runtime_error that `run` throws, "" when it throws none.
template <typename Run>
std::string error_of(Run run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

inline int main(int argc, char** argv) {
  int failures = 0, ran = 0;
  for (const Test& test : tests()) {
    bool asked = argc < 2;
    for (int i = 1; i < argc; ++i) asked |= std::strcmp(argv[i], test.name) == 0;
    if (!asked) continue;
    ++ran;
    try {
      test.run();
      std::printf("ok    %s\n", test.name);
    } catch (const std::exception& error) {
      ++failures;
      std::printf("FAIL  %s: %s\n", test.name, error.what());
    }
  }
  if (ran == 0) std::printf("no such test\n");
  return failures != 0 || ran == 0;
}

}  // namespace check

#define TEST(name)                                            \
  static void name();                                         \
  static const check::Register register_##name(#name, &name); \
  static void name()
#define CHECK(condition) \
  if (!(condition)) check::fail(__FILE__, __LINE__, #condition)
#define CHECK_EQUAL(a, b) check::equal(a, b, #a " == " #b, __FILE__, __LINE__)
#define CHECK_CONTAINS(text, part)                                                               \
  if (std::string(text).find(part) == std::string::npos) {                                       \
    check::fail(__FILE__, __LINE__, "\"" + std::string(part) + "\" not in: \"" + (text) + "\""); \
  }
