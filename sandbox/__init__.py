"""The room of the sandbox: zygote, keeper, jail, bridge and the agent runtimes.

Holds: everything that runs on the far side of the zygote's fork, and the two formats the runner shares with it
(protocol.py, journal.py). Never holds: anything of ashd, any import outside the standard library; the modules that fork
import neither asyncio nor threading. Runs in: the zygote, one keeper and one bridge per sandbox. Ends: a keeper with
its jail, the zygote with its supervisor.
"""
