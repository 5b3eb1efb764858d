# The target treeattn_fmt: fmt's headers, and its functions compiled once for whoever links it.
find_package(fmt QUIET)
find_path(TREEATTN_FMT_INCLUDE_DIR NAMES fmt/format-inl.h)
if(NOT TREEATTN_FMT_INCLUDE_DIR)
  message(FATAL_ERROR "fmt was not found; install libfmt-dev, or set TREEATTN_FMT_INCLUDE_DIR")
endif()
add_library(treeattn_fmt OBJECT ${CMAKE_CURRENT_LIST_DIR}/fmt_impl.cpp)
target_include_directories(treeattn_fmt SYSTEM PUBLIC ${TREEATTN_FMT_INCLUDE_DIR})
