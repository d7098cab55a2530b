"""What the package does when processes die, disks fill up, files are damaged, input is bad, and runs are long."""
