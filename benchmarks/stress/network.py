"""A network connection that can be cut."""

import socket
import threading


class Proxy:
    """Forwards the connections to a port of this machine, until they are cut.

    From then on nothing arrives, and no side is told, as when a cable is pulled. Use it as a
    context manager.
    """

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._target = 0
        self._is_cut = threading.Event()
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def address(self, target: int) -> str:
        """Return ``HOST:PORT`` to connect to in place of port `target`."""
        self._target = target
        host, port = self._server.getsockname()
        return f"{host}:{port}"

    def cut(self) -> None:
        """Deliver nothing from now on."""
        self._is_cut.set()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # closing alone would leave `accept` waiting
        self._thread.join()
        for each in (self._server, *self._sockets):
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return  # shut down
            self._sockets.append(near)
            if self._is_cut.is_set():
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()  # nobody listens yet
                continue
            self._sockets.append(far)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                if self._is_cut.is_set():
                    return
                sink.sendall(data)
            if not self._is_cut.is_set():
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # closed by either side
