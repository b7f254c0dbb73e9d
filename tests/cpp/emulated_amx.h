// The tile instructions in software, for processors without them: what they do by Intel's manual (Software Developer's
// Manual, volume 2; Instruction Set Extensions reference, chapter on AMX). A use that would raise an exception ends the
// program with a line that says which.
//
// trap() makes them the processor's: an instruction that it does not know interrupts the program, is done here, and the
// program goes on behind it. So the very code that is shipped runs, as the compiler left it.
#pragma once

#include <cstdint>

namespace specbranch::emulated_amx {

// Where the processor has tiles, its own are used, and nothing is trapped.
void trap();

// Whether it has, and the operating system grants them to this process.
bool has_tiles();

void load_config(const void* config);  // LDTILECFG
void release();                        // TILERELEASE
void zero(int tile);                   // TILEZERO
void load(int tile, const void* rows, int64_t stride);
void store(int tile, void* rows, int64_t stride);
void add_products(int sums, int a, int b);
void add_byte_products(int sums, int a, int b);  // TDPBF16PS

// Whether the calling thread has tiles.
bool configured();

}  // namespace specbranch::emulated_amx
