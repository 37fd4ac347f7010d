// What glibc 2.28 and GLIBCXX_3.4.24 (manylinux_2_28) lack of what a compiler of Debian 12 uses.
// Linked into the library, so that it asks the system for nothing newer.
//
// libc10 happens to export some of these, without a version: left to it, they would pass a check of
// versions and still be missing one day.

#include <new>
#include <sstream>

// GLIBCXX_3.4.26 and 3.4.29 of the shared library.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// glibc 2.29 made a version of exp that leaves errno alone; the older one computes the same.
#ifdef __x86_64__
extern "C" double exp_of_any_glibc(double x);
__asm__(".symver exp_of_any_glibc, exp@GLIBC_2.2.5");
extern "C" double exp(double x) { return exp_of_any_glibc(x); }
#endif
