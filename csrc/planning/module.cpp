// The Python module specbranch.core._planning: the speculation tree, the calibration, and look-ups in texts. It is apart
// from specbranch_ext._C, so that it needs neither torch nor OpenMP where it is imported. _planning.pyi says what it
// offers.
#include "planning/bindings.h"

PYBIND11_MODULE(_planning, m) {
  m.doc() =
      "The speculation tree, the online calibration and look-ups in texts: see specbranch.core.tree, "
      "specbranch.policies.calibration, specbranch.core.suffix_index.";
  specbranch::bind_proposals(m);
  specbranch::bind_tree(m);
  specbranch::bind_calibration(m);
  specbranch::bind_retrieval(m);
}
