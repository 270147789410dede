// Calls the C functions of the kernels for another process, on copies of its memory. Compiled for another processor, it
// runs under an emulator of that.
//
// A request on standard input is made of 64-bit numbers and of bytes: the place of the function in FUNCTIONS; how many
// blocks of memory, and of each its size and its bytes; how many pointers there are inside of blocks, and of each where
// it is (block, offset) and where it points to (block, offset); how many arguments, and of each a block or -1, and an
// offset or a number. The answer: the function's result, and the bytes of every block.
#include <sys/mman.h>

#include <cstdio>
#include <vector>

#include "kernels.cpp"

typedef int64_t (*Function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
#define FUNCTION(name) reinterpret_cast<Function>(reinterpret_cast<void*>(tqdit::tqdit_##name))
const Function FUNCTIONS[] = {TQDIT_FUNCTIONS};  // a list of FUNCTION(name), in the order of signatures.py

constexpr size_t PAGE = 4096;

int64_t number() {
  int64_t found;
  if (std::fread(&found, sizeof found, 1, stdin) != 1) std::exit(0);  // the other process has no more requests
  return found;
}

// Memory that ends where a page ends, before one that cannot be read: what reads on dies.
struct Block {
  char *pages, *begin;
  size_t size, whole;
  explicit Block(size_t size) : size(size), whole((size + PAGE - 1) / PAGE * PAGE + PAGE) {
    pages = static_cast<char*>(mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (pages == MAP_FAILED || mprotect(pages + whole - PAGE, PAGE, PROT_NONE)) std::abort();
    begin = pages + whole - PAGE - size;
    if (size && std::fread(begin, size, 1, stdin) != 1) std::abort();
  }
};

int main() {
  for (;;) {
    const Function function = FUNCTIONS[number()];
    std::vector<Block> blocks;
    for (int64_t left = number(); left; --left) blocks.emplace_back(number());
    for (int64_t left = number(); left; --left) {
      char* const at = blocks[number()].begin;
      const int64_t offset = number();
      const char* const to = blocks[number()].begin;
      const char* const pointer = to + number();
      std::memcpy(at + offset, &pointer, sizeof pointer);
    }
    int64_t a[9] = {};
    const int64_t count = number();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = number();
      a[i] = number() + (block < 0 ? 0 : reinterpret_cast<int64_t>(blocks[block].begin));
    }
    const int64_t result = function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]);
    std::fwrite(&result, sizeof result, 1, stdout);
    for (const Block& block : blocks) {
      std::fwrite(block.begin, 1, block.size, stdout);
      munmap(block.pages, block.whole);
    }
    std::fflush(stdout);
  }
}
