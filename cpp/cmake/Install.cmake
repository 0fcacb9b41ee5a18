# What others build with: headers, the CMake package sd35, pkg-config.

include(CMakePackageConfigHelpers)

install(TARGETS sd35 EXPORT sd35Targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/sd35 DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/sd35)
install(EXPORT sd35Targets NAMESPACE sd35:: DESTINATION ${package_dir})
configure_package_config_file(cmake/sd35Config.cmake.in generated/sd35Config.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(generated/sd35ConfigVersion.cmake
                                 COMPATIBILITY SameMajorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/generated/sd35Config.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/generated/sd35ConfigVersion.cmake
        DESTINATION ${package_dir})

# So that the tree may be moved.
set(pc_dir /${CMAKE_INSTALL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH pc_include ${pc_dir} /${CMAKE_INSTALL_INCLUDEDIR})
configure_file(cmake/sd35.pc.in generated/sd35.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/generated/sd35.pc
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
