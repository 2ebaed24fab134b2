// The kernels of one level: what stands between the braces is compiled for it alone (levels.h says why).
#include <immintrin.h>
#include "levels.h"

namespace qr::avx512 {
#include "types.h"
#include "vec_avx512.h"
#include "elementwise.h"
#include "heads.h"
constexpr int ROWS_OF_ONE = 8, ROWS_OF_TWO = 8;  // weight rows at a time, for one and two tokens
#include "linear.h"
#include "linear_avx512.h"
#include "quantized.h"
#include "quantized_avx512.h"
#include "lanes_avx512.h"
#include "attention_avx512.h"
constexpr bool FAST_PAIRS = true;
#include "attention.h"
#include "table.h"
}  // namespace qr::avx512
