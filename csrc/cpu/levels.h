// Which kernels serve which level of instructions. Each level is one translation unit with flags of its own; nothing in
// it may be shared with another (an inline function compiled for AVX-512 must not be the copy that the linker keeps).
#pragma once
#include "pool.h"

namespace qr {
namespace portable { extern const Kernel kernels[QR_OPS]; }
// The build defines these for the levels that the compiler could make.
#ifdef QR_WITH_AVX2
namespace avx2 { extern const Kernel kernels[QR_OPS]; }
#endif
#ifdef QR_WITH_AVX512
namespace avx512 { extern const Kernel kernels[QR_OPS]; }
#endif

inline const Kernel* kernels_of(int level) {
#ifdef QR_WITH_AVX512
    if (level == QR_AVX512) return avx512::kernels;
#endif
#ifdef QR_WITH_AVX2
    if (level == QR_AVX2) return avx2::kernels;
#endif
    return level == QR_PORTABLE ? portable::kernels : nullptr;
}
}  // namespace qr
