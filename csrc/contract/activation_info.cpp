// Turns the list of activation.h into the table behind activation_info(). The only baseline file
// that includes activation.h for more than its types; computes no activation.
#include "activation_info.h"

namespace fastmlp {
namespace {

template <class List> struct Table;

template <class... A> struct Table<ActivationList<A...>> {
  static constexpr ActivationInfo rows[] = {{A::name, A::parameters, A::keeps_output}...};
};

}  // namespace

const ActivationInfo& activation_info(int kind) { return Table<Activations>::rows[kind]; }

}  // namespace fastmlp
