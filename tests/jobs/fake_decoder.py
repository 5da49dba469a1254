"""A decoder that misbehaves: fake_decoder.py BEHAVIOUR MEMORY CPU_SECONDS. The file "good" is decoded."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time

from mooring_server.jobs.decoding.frames import FrameError, read_frame, write_frame

behaviour, cpu = sys.argv[1], int(sys.argv[3])
out = sys.stdout.buffer
write_frame(out, {"ready": True})
while True:
    try:
        _, data = read_frame(sys.stdin.buffer, max_body=2**20)
    except FrameError:
        break
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (used + cpu, used + cpu + 5))
    if data == b"good":
        write_frame(out, {"size": [1, 1]}, b"rgb")
    elif behaviour == "segfault":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGSEGV)
    elif behaviour == "exit":
        sys.exit(3)
    elif behaviour == "hang":
        time.sleep(600)
    elif behaviour == "spin":
        while True:
            pass
    elif behaviour == "garbage":
        out.write(b"\xff" * 64)
        out.flush()
    elif behaviour == "huge":
        write_frame(out, {"size": [1024, 1024]}, bytes(4 * 2**20))
    elif behaviour == "wrong size":
        write_frame(out, {"size": [4000, 4000]}, b"rgb")
    elif behaviour == "not json":
        out.write((4).to_bytes(4, "big") + bytes(4) + b"nope")
        out.flush()
    elif behaviour == "unknown reason":
        write_frame(out, {"reason": "NOT_ALLOWED", "message": "x", "remedy": "y"})
    elif behaviour == "pid":
        write_frame(out, {"reason": "BAD_IMAGE", "message": "cat.jpg is bad.", "remedy": str(os.getpid())})
    elif behaviour == "environment":
        text = json.dumps(dict(os.environ))
        write_frame(out, {"reason": "BAD_IMAGE", "message": "cat.jpg is bad.", "remedy": text})
