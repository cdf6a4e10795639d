#pragma once

// The library is built with -fvisibility=hidden; what users may call carries this mark.
#define TORCH_SELFATTN_API __attribute__((visibility("default")))
