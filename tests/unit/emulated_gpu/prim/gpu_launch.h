#pragma once
#include "prim/gpu.h"
