// The kernels of one level: what stands between the braces is compiled for it alone (levels.h says why).

#include "levels.h"

namespace qr::portable {
#include "types.h"
#include "vec_portable.h"
#include "elementwise.h"
#include "heads.h"
constexpr int ROWS_OF_FEW = 4;  // weight rows at a time, for one or two tokens
#include "linear.h"
void linear(const qr_op& op, Context& c) { linear_generic(op, c); }
#include "quantized.h"
void linear_q(const qr_op& op, Context& c) { linear_q_generic(op, c); }
constexpr bool FAST_PAIRS = false;
#include "attention.h"
#include "sampling.h"
#include "table.h"
}  // namespace qr::portable
