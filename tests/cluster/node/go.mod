module undermesh/tests/cluster/node

go 1.26
