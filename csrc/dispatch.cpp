#include "dispatch.h"

#include "gumbel_noise.h"

namespace specbranch {

SPECBRANCH_DISPATCH(gumbel_noise, GumbelNoiseParams)

}  // namespace specbranch
