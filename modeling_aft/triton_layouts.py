# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How the Triton kernels are laid out, by compute capability, form and direction; `default` is for GPUs that were not
measured. scripts/tune_triton.py writes the entry of the GPU that it measures.

Numbers are those of half precision; in others tiles are half as large, which takes as many registers.

simple, windowed: `columns` of a program. `num_warps` of it: one warp reduces over time without the others, and repeats
no work of theirs. `processor_warps`: how many warps a multiprocessor should get; where there are fewer, time is cut
into chunks.

full: `rows` and `columns` of a tile of the result, of which there are two, `depth` of what is multiplied at once,
`num_warps` of a program, and `num_stages`: how many factors it loads ahead. The default fits into 99 KiB.
"""

LAYOUTS = {
    "default": {
        "simple": {
            "forward": {"columns": 32, "num_warps": 1, "processor_warps": 8},
            "backward": {"columns": 32, "num_warps": 1, "processor_warps": 8},
        },
        "windowed": {
            "forward": {"columns": 32, "num_warps": 1, "processor_warps": 8},
            "backward": {"columns": 32, "num_warps": 1, "processor_warps": 8},
        },
        "full": {
            "forward": {"rows": 128, "columns": 64, "depth": 32, "num_warps": 8, "num_stages": 3},
            "backward": {"rows": 128, "columns": 64, "depth": 32, "num_warps": 8, "num_stages": 3},
        },
    },
    "sm_90": {
        "full": {
            "forward": {"rows": 128, "columns": 128, "depth": 64, "num_warps": 8, "num_stages": 3},
            "backward": {"rows": 128, "columns": 128, "depth": 64, "num_warps": 8, "num_stages": 3},
        },
    },
}
