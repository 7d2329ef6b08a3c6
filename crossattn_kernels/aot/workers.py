"""Compilation in processes of their own: Triton's compiler aborts its process on some kernels instead of raising."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import NamedTuple

from crossattn_kernels.aot import Call, Row, compile_named
from crossattn_kernels.tuning import Config, suppose
from crossattn_kernels.tuning.tables import Key

LIMIT = 300  # seconds for a kernel, after which its compiler counts as hung


class Failure(NamedTuple):
    """A call that was not compiled to the end."""

    kernel: str  # that was being compiled
    reason: str


class Worker:
    """A process that compiles one call after the other, and is replaced when it dies."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.arch, other), daemon=True)
        self.process.start()
        other.close()  # so that the pipe ends with the process

    def compile(self, call: Call, entries: dict[Key, Config] | None = None, brief: bool = False) -> list[Row] | Failure:
        """What became of it where tables have these entries."""
        kernel = "no kernel"
        try:
            self.connection.send((call, entries or {}, brief))
            while self.connection.poll(LIMIT):
                message = self.connection.recv()
                if not isinstance(message, str):
                    return message
                kernel = message
            reason = f"took longer than {LIMIT} s"
        except (EOFError, OSError):  # the pipe ended
            self.process.join()
            reason = f"the compiler died with exit code {self.process.exitcode}"
        self.stop()
        self._start()
        return Failure(kernel, reason)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def compile_all(arch: str, calls: Sequence[Call], jobs: int = 1) -> Iterator[list[Row] | Failure]:
    """What became of each call, in order, by `jobs` processes."""
    idle: SimpleQueue[Worker] = SimpleQueue()
    workers = [Worker(arch) for _ in range(jobs)]
    for worker in workers:
        idle.put(worker)

    def compile_one(call: Call) -> list[Row] | Failure:
        worker = idle.get()
        try:
            return worker.compile(call)
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(compile_one, calls)
    finally:
        for worker in workers:
            worker.stop()


def _serve(arch: str, connection: Connection) -> None:
    """In the worker: the name of every kernel before it is compiled, then the rows of the call."""
    names: list[str] = []

    def started(kernel: str) -> None:
        names.append(kernel)
        connection.send(kernel)

    while True:
        try:
            call, entries, brief = connection.recv()
        except EOFError:
            return
        names.clear()
        try:
            with suppose(entries):
                connection.send(compile_named(arch, call, started, brief))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error) or 'no message'}".splitlines()[0]
            connection.send(Failure(names[-1] if names else "no kernel", reason))
