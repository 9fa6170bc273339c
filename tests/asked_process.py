"""A script that runs beside the tests and answers requests, a line of JSON each."""

import json
import os
import subprocess
import sys


class AskedProcess:
    """A script in a process of its own, with one thread.

    Args:
        script: reads requests from stdin and writes answers to stdout.
        environment: of it, beside this process's.
    """

    def __init__(self, script, **environment):
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, **environment},
        )

    def ask(self, **request) -> dict:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self):
        self.server.stdin.close()
        self.server.wait(timeout=60)
        self.server.stdout.close()
