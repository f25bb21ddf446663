// How loops become vector code for whatever processor runs them.
#pragma once

// one binary for every x86-64: the loader picks the widest vectors the processor has
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__)
#define XCLIP_FAST_VECTORS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define XCLIP_FAST_VECTORS
#endif
#define XCLIP_FAST_INLINE inline __attribute__((always_inline))
