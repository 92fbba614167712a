"""The deterministic simulator: whole clusters of real nodes in simulated time, on simulated networks, disks and clocks.

    python -m tests.sim --seed 7            one run, with everything that goes wrong in it drawn from that number
    python -m tests.sim --seeds 1000        many of them; make sim SEEDS=1000 does the same
    python -m tests.sim --script NAME       a scripted world, --plant NAME: with its bug in the core
    python -m tests.sim --teeth             the table of planted bugs and how soon each is caught

What is real: core.Node with all of its roles, and in a part of the runs protocol.Session and the frames. What is
simulated: time (engine), connections (network, wires), databases and journals (disk), the daemon around a node (shell),
task processes (work), clients (clients). What goes wrong is in faults, or scripted in coincidences; what must hold
whatever goes wrong, in referee.
"""
