# Install rules: library, public headers, command line, and the package that find_package(treeattn) reads.
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/treeattn)

install(TARGETS treeattn EXPORT treeattnTargets
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
if(TARGET treeattn_cli)
  install(TARGETS treeattn_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
install(DIRECTORY runtime/include/treeattn generator/include/treeattn
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

install(EXPORT treeattnTargets NAMESPACE treeattn:: DESTINATION ${package_dir})
configure_package_config_file(cmake/treeattnConfig.cmake.in ${PROJECT_BINARY_DIR}/treeattnConfig.cmake
  INSTALL_DESTINATION ${package_dir})
# Before 1.0 a minor version may change the API.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/treeattnConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/treeattnConfig.cmake ${PROJECT_BINARY_DIR}/treeattnConfigVersion.cmake
  cmake/treeattnSodium.cmake DESTINATION ${package_dir})
