// A handle of the operators of CPU shared memory stands for one Team: this rank's part in one
// group.
#pragma once

#include <memory>

#include "prim/handles.h"
#include "shm/team.h"

namespace torch_glue {

using TeamPtr = std::shared_ptr<shm::Team>;

// The open Teams.
prim::Handles<shm::Team>& teams();

// Of an open handle, in the process that opened it; else throws. A call holds its Team, so that
// another thread's shm_close does not unmap it underneath.
TeamPtr team_of(int64_t handle);

}  // namespace torch_glue
