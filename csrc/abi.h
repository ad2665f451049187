// What every file of the core sees: the interface, and how its functions are exported.
#pragma once
#include "records.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
