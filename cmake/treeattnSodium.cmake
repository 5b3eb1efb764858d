# The imported target treeattn::sodium, for building the library and for linking its static form.
# The archive is preferred, so that neither the library nor an app needs libsodium.so at run time.
if(NOT TARGET treeattn::sodium)
  find_path(TREEATTN_SODIUM_INCLUDE_DIR NAMES sodium.h)
  find_library(TREEATTN_SODIUM_LIBRARY NAMES libsodium.a sodium)
  mark_as_advanced(TREEATTN_SODIUM_INCLUDE_DIR TREEATTN_SODIUM_LIBRARY)
  if(NOT TREEATTN_SODIUM_INCLUDE_DIR OR NOT TREEATTN_SODIUM_LIBRARY)
    message(FATAL_ERROR "libsodium was not found; install libsodium-dev, or set TREEATTN_SODIUM_INCLUDE_DIR and "
      "TREEATTN_SODIUM_LIBRARY")
  endif()
  add_library(treeattn::sodium UNKNOWN IMPORTED)
  set_target_properties(treeattn::sodium PROPERTIES
    IMPORTED_LOCATION ${TREEATTN_SODIUM_LIBRARY}
    INTERFACE_INCLUDE_DIRECTORIES ${TREEATTN_SODIUM_INCLUDE_DIR})
endif()
