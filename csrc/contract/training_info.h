// The descriptions of the losses of loss.h and the rules of update.h as tables, for baseline code that enumerates them:
// what reads the objects of Python, and what tells Python which there are. Computes nothing.
#pragma once

#include "loss.h"
#include "update.h"

namespace fastmlp {

const LossInfo& loss_info(int kind);
const RuleInfo& rule_info(int rule);

}  // namespace fastmlp
