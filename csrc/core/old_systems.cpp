// What headers of newer compilers take from newer systems, defined here: the library then loads
// with glibc 2.28 and the libstdc++ of GCC 8, as manylinux_2_28 asks. csrc/exports.map keeps these
// names to ourselves.
#include <sstream>

#ifdef __GLIBCXX__

#include <new>

// By this of glibc 2.32 shared_ptr knows whether it can do without atomic instructions; zero: it
// cannot.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

namespace std {

// of GCC 11: what new[] and allocators throw for a length that no array can have
[[noreturn]] void __throw_bad_array_new_length();
[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// of GCC 9; the constructors that take a mode are older
template basic_stringstream<char>::basic_stringstream();
template basic_ostringstream<char>::basic_ostringstream();

}  // namespace std

#endif
