// Turns the lists of loss.h and update.h into the tables behind training_info.h. Must stay baseline code: what is
// emitted here may run on every processor.
#include "training_info.h"

namespace fastmlp {
namespace {

template <class List> struct Table;

template <class... L> struct Table<LossList<L...>> {
  static constexpr LossInfo rows[] = {L::info...};
};

template <class... R> struct Table<RuleList<R...>> {
  static constexpr RuleInfo rows[] = {R::info...};
};

}  // namespace

const LossInfo& loss_info(int kind) { return Table<Losses>::rows[kind]; }
const RuleInfo& rule_info(int rule) { return Table<Rules>::rows[rule]; }

}  // namespace fastmlp
