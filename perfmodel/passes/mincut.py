"""Minimum cut of a flow network by Dinic's algorithm, for the few hundred nodes of a step.

scipy's and networkx's are as good, but take longer to import than a prediction takes.
"""

from collections import deque

INFINITE = 1 << 62


class Network:
    """Nodes are integers from 0; edges have integer capacities."""

    def __init__(self) -> None:
        self.edges: list[list[int]] = []  # of each node, indices into the lists below
        self.head: list[int] = []
        self.room: list[int] = []

    def node(self) -> int:
        """A new node."""
        self.edges.append([])
        return len(self.edges) - 1

    def edge(self, tail: int, head: int, capacity: int) -> None:
        """A directed edge; its reverse is the next one."""
        for start, end, room in ((tail, head, capacity), (head, tail, 0)):
            self.edges[start].append(len(self.head))
            self.head.append(end)
            self.room.append(room)

    def source_side(self, source: int, sink: int) -> set[int]:
        """The nodes on the source's side of the minimum cut that lies nearest to the source."""
        while sink in (level := self._levels(source)):
            following = [0] * len(self.edges)
            while self._augment(source, sink, level, following):
                pass
        return set(level)

    def _levels(self, source: int) -> dict[int, int]:
        """Steps from the source to each node that it reaches."""
        level, queue = {source: 0}, deque([source])
        while queue:
            at = queue.popleft()
            for e in self.edges[at]:
                if self.room[e] > 0 and self.head[e] not in level:
                    level[self.head[e]] = level[at] + 1
                    queue.append(self.head[e])
        return level

    def _augment(self, source: int, sink: int, level: dict[int, int], following: list[int]) -> bool:
        """Push flow along one shortest path, if there is one left."""
        path: list[int] = []
        at = source
        while at != sink:
            edges = self.edges[at]
            while following[at] < len(edges):
                e = edges[following[at]]
                if self.room[e] > 0 and level.get(self.head[e], -1) == level[at] + 1:
                    break
                following[at] += 1
            else:
                if not path:
                    return False
                at = self.head[path.pop() ^ 1]
                following[at] += 1
                continue
            path.append(e)
            at = self.head[e]
        pushed = min(self.room[e] for e in path)
        for e in path:
            self.room[e] -= pushed
            self.room[e ^ 1] += pushed
        return True
