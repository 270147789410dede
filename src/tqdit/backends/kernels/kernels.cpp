// Fused CPU kernels of a transformer block, called through C functions. Built on the user's machine at first use (../native.py).
//
// Codes travel as unsigned bytes u = code + 128, because VNNI multiplies unsigned by signed bytes. Integer sums are
// exact; float arithmetic follows ops/reference.py operation by operation (the build forbids contraction to fma), so
// that codes differ only where exp, GELU or LayerNorm, which round differently from torch's, meet a rounding boundary.
// Rows are independent and each is summed in one fixed order: neither threads nor the batch change a result.
#include "attention.h"
#include "elementwise.h"
#include "ends.h"
#include "epilogues.h"
#include "float_panels.h"
