// For host tests of csrc headers: a failed check ends the program with its place and the case at hand.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#define CHECK(condition, context)                                                                            \
  do {                                                                                                       \
    if (!(condition)) {                                                                                      \
      std::fprintf(stderr, "%s:%d: %s; %s\n", __FILE__, __LINE__, #condition, std::string(context).c_str()); \
      std::exit(1);                                                                                          \
    }                                                                                                        \
  } while (false)
