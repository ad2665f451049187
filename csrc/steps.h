// What a program is made of (quantpage_run), each by the threads of a team.
//
// A step does what it can before the ones before it are done, waits once, and ends without waiting: the
// next one does. So `wait` stands between any two stages, and what threads differ by at a step's end is
// hidden by the beginning of the next.
#pragma once
#include "abi.h"
#include "team.h"

// Each returns 0, or 1 where this machine does not run the instruction set that the record names.
int64_t project(const Project&, const Team&);
int64_t write(const Write&, const Team&);
int64_t attend(const Attend&, const Team&);
int64_t finish(const Finish&, const Team&);
int64_t normalize(const Norm&, const Team&);
