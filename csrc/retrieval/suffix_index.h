// Where the newest tokens of a text occurred before: the text's tokens, and its prefixes in order. core/suffix_index.py
// says what that is for; tests/support/plain_suffix_index.py defines every function in plain Python. No Python, no torch.
#pragma once

#include <cstdint>
#include <vector>

namespace specbranch {

// How many tokens two texts have in common, read backwards from their ends, of at most `most`.
inline int64_t common_end(const int32_t* a, const int32_t* b, int64_t most) {
  int64_t i = 0;
  for (; i + 8 <= most; i += 8) {
    int32_t differ = 0;
    for (int64_t j = i; j < i + 8; ++j) differ |= a[-j] ^ b[-j];
    if (differ) break;
  }
  while (i < most && a[-i] == b[-i]) ++i;
  return i;
}

// Each prefix of the text is named by its last position. They are ordered by their tokens read backwards, at most DEPTH
// of them; where one runs out of text it comes first, and equal ones come by position. These are prefixes, not the
// suffixes of a suffix array, because a prefix never changes when text is appended: so the order stays valid while a
// text grows, and what is new is merged into it.
//
// New positions wait in a tail without order, which look-ups scan, until there are as many as make a merge worth while.
class SuffixIndex {
 public:
  static constexpr int64_t DEPTH = 64;
  static constexpr int64_t MOST_TOKENS = INT32_MAX - 1;
  static constexpr int32_t LARGEST_TOKEN = INT32_MAX - 1;

  explicit SuffixIndex(std::vector<int32_t> tokens);
  // Over tokens and an order that somebody else keeps. Of a file, say: the order is not believed, but read with care.
  SuffixIndex(const int32_t* tokens, const int32_t* order, int64_t size);
  SuffixIndex(const SuffixIndex&) = delete;
  SuffixIndex& operator=(const SuffixIndex&) = delete;

  int64_t size() const { return size_; }
  bool is_mapped() const { return mapped_; }
  const int32_t* tokens() const { return tokens_; }
  // Of the first sorted() positions; the others are the tail.
  const int32_t* order() const { return order_; }
  int64_t sorted() const { return sorted_; }
  // An entry of the order. Raises std::invalid_argument for one that is no position.
  int64_t position(int64_t entry) const;
  // How many entries of the order do not come after a text, of which `end` is the newest of `count` tokens; the first
  // `from` are known not to.
  int64_t place(const int32_t* end, int64_t count, int64_t from = 0) const;

  // Append tokens. Raises std::invalid_argument for more than there is room for, or when the index is mapped.
  void extend(const std::vector<int32_t>& tokens);
  // Sort the tail, and merge it into the order.
  void merge();
  // Whether the order is one: every sorted position once, each where it belongs; and the tokens are some.
  bool check() const;

 private:
  bool precedes(int64_t a, int64_t b) const;
  void adopt();

  std::vector<int32_t> own_tokens_, own_order_;
  bool mapped_ = false;
  const int32_t *tokens_ = nullptr, *order_ = nullptr;
  int64_t size_ = 0, sorted_ = 0;
};

}  // namespace specbranch
