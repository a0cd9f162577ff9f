// Random numbers, drawn as torch draws them. Called by register.cpp.
#pragma once

#include "../contract/draws.h"

namespace fastmlp::cpu {

// Fills the output, and moves the generator on. In the calling thread alone, because each block of the generator's
// words follows from the one before.
void draw(const BernoulliDraw& draw, Twister& generator);

}  // namespace fastmlp::cpu
