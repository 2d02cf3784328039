// One function, compiled for several instruction sets; the loader picks at run time.
#pragma once

// VECTORISED marks a function with a plain loop that the compiler vectorises: AVX-512, AVX2 and the
// baseline on x86-64 (an ifunc chooses when the library is loaded), the baseline (NEON) elsewhere.
// ThreadSanitizer runs before ifuncs may be resolved, so its builds take the baseline.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif
