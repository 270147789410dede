// Deals pieces of work from several threads at a time, with changing numbers of helpers; for the thread sanitizer.
#include "team.h"

#include <cstdio>

constexpr int ITEMS = 997, ROUNDS = 600;

void each_item_once_a_round(int seed) {
  std::vector<int> items(ITEMS);
  for (int round = 0; round < ROUNDS; ++round) {
    tqdit::deal_rows(1 + (round * 7 + seed) % 6, ITEMS, 1 + round % 13, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) ++items[begin];
    });
    if (round % 97 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the helpers fall asleep
  }
  for (int times : items)
    if (times != ROUNDS) std::abort();
}

int main() {
  std::thread first(each_item_once_a_round, 1), second(each_item_once_a_round, 3);
  each_item_once_a_round(2);
  first.join();
  second.join();
  std::puts("every item, once a round");
}
