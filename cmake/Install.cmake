# Library, headers and package config. The prefix is the Python package's folder, or any other: the
# layout is the usual one, so that folder can be given to CMAKE_PREFIX_PATH as it is.
include(CMakePackageConfigHelpers)
set(config_dir share/cmake/TorchSelfAttn)

install(TARGETS torch_selfattn EXPORT TorchSelfAttnTargets LIBRARY DESTINATION lib)
install(EXPORT TorchSelfAttnTargets NAMESPACE TorchSelfAttn:: DESTINATION ${config_dir})
install(DIRECTORY csrc/include/torch_selfattn DESTINATION include)

string(REGEX MATCH "^[0-9]+\\.[0-9]+" TORCH_SELFATTN_TORCH_MINOR "${TORCH_SELFATTN_TORCH_VERSION}")
string(REPLACE "." "\\\\." TORCH_SELFATTN_TORCH_MINOR_REGEX "${TORCH_SELFATTN_TORCH_MINOR}")
# A build that stays on this machine also remembers where its torch was.
set(TORCH_SELFATTN_TORCH_HINT "")
if(NOT TORCH_SELFATTN_WHEEL)
  set(TORCH_SELFATTN_TORCH_HINT "${TORCH_SELFATTN_TORCH_PREFIX}")
endif()
configure_package_config_file(cmake/TorchSelfAttnConfig.cmake.in TorchSelfAttnConfig.cmake
                              INSTALL_DESTINATION ${config_dir})
write_basic_package_version_file(TorchSelfAttnConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/TorchSelfAttnConfig.cmake
              ${PROJECT_BINARY_DIR}/TorchSelfAttnConfigVersion.cmake cmake/TorchTargets.cmake
        DESTINATION ${config_dir})
