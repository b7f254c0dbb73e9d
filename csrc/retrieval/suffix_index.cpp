#include "retrieval/suffix_index.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace specbranch {
namespace {

// Sorts all prefixes of a text by prefix doubling: once they are sorted by their last h tokens, the groups of those that
// are equal so far are sorted by where the prefixes h tokens before stand. Six rounds after the first token reach DEPTH,
// and each takes time in proportion to what is not alone yet, whatever the text. Its memory: 20 bytes a token at most.
class Sorting {
 public:
  Sorting(const int32_t* tokens, int64_t size) : size_(size), order_(size) {
    std::iota(order_.begin(), order_.end(), 0);
    if (size == 0) return;
    order_[0] |= FIRST;
    bool equal = sort([&](int64_t position) { return tokens[position]; });
    std::vector<int32_t> rank(size, -1);
    for (int64_t h = 1; h < SuffixIndex::DEPTH && equal; h *= 2) {
      number(rank);
      equal = sort([&](int64_t position) { return position < h ? -1 : rank[position - h]; });
    }
    for (int32_t& entry : order_) entry &= POSITION;
  }

  std::vector<int32_t> take() { return std::move(order_); }

 private:
  // Positions leave the highest bit free: it is set where a group begins.
  static constexpr int32_t FIRST = std::numeric_limits<int32_t>::min(), POSITION = ~FIRST;
  static constexpr int DIGIT = 11;                  // bits
  static constexpr int64_t BY_DIGITS = 1 << DIGIT;  // so large a group is worth counting digits

  int64_t end_of_group(int64_t begin) const {
    int64_t end = begin + 1;
    while (end < size_ && order_[end] >= 0) ++end;
    return end;
  }

  // The place where its group begins, of every position. A group that begins where it did has its number already.
  void number(std::vector<int32_t>& rank) const {
    for (int64_t begin = 0, end; begin < size_; begin = end) {
      end = end_of_group(begin);
      if (rank[order_[begin] & POSITION] == begin) continue;
      for (int64_t i = begin; i < end; ++i) rank[order_[i] & POSITION] = static_cast<int32_t>(begin);
    }
  }

  // Divide every group by a key from -1 on. Returns whether any are still equal.
  template <typename Key>
  bool sort(const Key& key) {
    bool equal = false;
    for (int64_t begin = 0, end; begin < size_; begin = end) {
      end = end_of_group(begin);
      if (end - begin > 1) equal |= sort_group(begin, end, key);
    }
    return equal;
  }

  // Positions of a group ascend, and do so in those that it is divided into.
  template <typename Key>
  bool sort_group(int64_t begin, int64_t end, const Key& key) {
    const int64_t count = end - begin;
    if (static_cast<int64_t>(items_.size()) < count) items_.resize(count);
    uint32_t least = std::numeric_limits<uint32_t>::max(), most = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t position = order_[begin + i] & POSITION;
      const auto found = static_cast<uint32_t>(key(position) + 1);
      least = std::min(least, found);
      most = std::max(most, found);
      items_[i] = static_cast<uint64_t>(found) << 32 | static_cast<uint32_t>(position);
    }
    if (least == most) return true;
    if (count < BY_DIGITS) {
      std::sort(items_.begin(), items_.begin() + count);
    } else {
      sort_by_digits(count, least, most);
    }
    bool equal = false;
    for (int64_t i = 0; i < count; ++i) {
      const bool same = i && items_[i] >> 32 == items_[i - 1] >> 32;
      equal |= same;
      order_[begin + i] = static_cast<int32_t>(items_[i]) | (same ? 0 : FIRST);
    }
    return equal;
  }

  void sort_by_digits(int64_t count, uint32_t least, uint32_t most) {
    if (static_cast<int64_t>(other_.size()) < count) other_.resize(count);
    for (int shift = 0; shift < 32 && (most - least) >> shift; shift += DIGIT) {
      const auto digit = [&](uint64_t item) {
        return ((static_cast<uint32_t>(item >> 32) - least) >> shift) & (BY_DIGITS - 1);
      };
      std::vector<int64_t> places(BY_DIGITS);
      for (int64_t i = 0; i < count; ++i) ++places[digit(items_[i])];
      int64_t before = 0;
      for (int64_t& place : places) place = std::exchange(before, before + place);
      for (int64_t i = 0; i < count; ++i) other_[places[digit(items_[i])]++] = items_[i];
      items_.swap(other_);
    }
  }

  int64_t size_;
  std::vector<int32_t> order_;
  std::vector<uint64_t> items_, other_;  // the key, and the position below it
};

// Make room by an eighth, not by doubling: a large index stays as small as it can.
void make_room(std::vector<int32_t>& values, int64_t size) {
  if (size > static_cast<int64_t>(values.capacity())) values.reserve(size + size / 8);
}

}  // namespace

SuffixIndex::SuffixIndex(std::vector<int32_t> tokens) : own_tokens_(std::move(tokens)) {
  if (static_cast<int64_t>(own_tokens_.size()) > MOST_TOKENS) {
    throw std::invalid_argument("tokens: expected at most " + std::to_string(MOST_TOKENS));
  }
  own_order_ = Sorting(own_tokens_.data(), static_cast<int64_t>(own_tokens_.size())).take();
  adopt();
}

SuffixIndex::SuffixIndex(const int32_t* tokens, const int32_t* order, int64_t size)
    : mapped_(true), tokens_(tokens), order_(order), size_(size), sorted_(size) {}

void SuffixIndex::adopt() {
  tokens_ = own_tokens_.data();
  order_ = own_order_.data();
  size_ = static_cast<int64_t>(own_tokens_.size());
  sorted_ = static_cast<int64_t>(own_order_.size());
}

int64_t SuffixIndex::position(int64_t entry) const {
  const int64_t position = order_[entry];
  if (position < 0 || position >= size_) {
    throw std::invalid_argument("order: entry " + std::to_string(entry) + " is " + std::to_string(position) +
                                ", expected a position from 0 to " + std::to_string(size_ - 1));
  }
  return position;
}

int64_t SuffixIndex::place(const int32_t* end, int64_t count, int64_t from) const {
  int64_t low = from, high = sorted_;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2, found = position(middle);
    const int64_t most = std::min({found + 1, count, DEPTH});
    const int64_t common = common_end(tokens_ + found, end, most);
    const bool after = common < most ? tokens_[found - common] > end[-common] : most < DEPTH && found + 1 > most;
    if (after) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Whether one prefix comes before another. Of two that are equal as far as both go, the shorter has the lower position.
bool SuffixIndex::precedes(int64_t a, int64_t b) const {
  const int64_t most = std::min({a + 1, b + 1, DEPTH});
  const int64_t common = common_end(tokens_ + a, tokens_ + b, most);
  return common < most ? tokens_[a - common] < tokens_[b - common] : a < b;
}

void SuffixIndex::extend(const std::vector<int32_t>& tokens) {
  if (mapped_) throw std::invalid_argument("extend: a mapped index cannot grow");
  const int64_t size = size_ + static_cast<int64_t>(tokens.size());
  if (size > MOST_TOKENS) throw std::invalid_argument("tokens: expected at most " + std::to_string(MOST_TOKENS));
  make_room(own_tokens_, size);
  own_tokens_.insert(own_tokens_.end(), tokens.begin(), tokens.end());
  adopt();
  // A merge moves the whole order: so much at a time, it is a thousand entries a token.
  if (size_ - sorted_ >= std::max<int64_t>(256, size_ / 1024)) merge();
}

void SuffixIndex::merge() {
  const int64_t count = size_ - sorted_;
  if (count == 0) return;
  if (count > size_ / 4) {  // sorting everything is faster than comparing so many one by one
    own_order_ = Sorting(tokens_, size_).take();
    adopt();
    return;
  }
  std::vector<int32_t> tail(count);
  std::iota(tail.begin(), tail.end(), static_cast<int32_t>(sorted_));
  std::sort(tail.begin(), tail.end(), [&](int32_t a, int32_t b) { return precedes(a, b); });
  std::vector<int64_t> places(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = tail[i];
    places[i] = place(tokens_ + position, position + 1, i ? places[i - 1] : 0);
  }
  make_room(own_order_, size_);
  own_order_.resize(size_);
  int64_t read = sorted_, written = size_;
  for (int64_t i = count - 1; i >= 0; --i) {
    std::copy_backward(own_order_.begin() + places[i], own_order_.begin() + read, own_order_.begin() + written);
    written -= read - places[i] + 1;
    own_order_[written] = tail[i];
    read = places[i];
  }
  adopt();
}

bool SuffixIndex::check() const {
  std::vector<bool> seen(sorted_);
  for (int64_t i = 0; i < sorted_; ++i) {
    const int64_t position = order_[i];
    if (position < 0 || position >= sorted_ || seen[position]) return false;
    seen[position] = true;
    if (i && !precedes(order_[i - 1], position)) return false;
  }
  return std::all_of(tokens_, tokens_ + size_, [](int32_t token) { return token >= 0 && token <= LARGEST_TOKEN; });
}

}  // namespace specbranch
