"""The lab: disposable Debian hosts on one machine, wired together as two sites and an Internet."""
