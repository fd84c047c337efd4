// Found before the compiler's own header where tests build the step with AVX-512 and AMX emulated.
#pragma once
#include_next <immintrin.h>
#include "emulated_avx512.h"
#include "emulated_amx.h"
