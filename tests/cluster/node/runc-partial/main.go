// Program runc-partial is runc for a cgroup2 tree that lacks controllers, because the machine has given them to
// cgroup v1. Limits whose controller is missing are left out before runc sees them: it would fail on files that are
// not there. It knows nothing of Kubernetes; where all controllers are there it changes nothing.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// The parts of `linux.resources` in a bundle's config.json, and the controller that each needs. Devices need none:
// in cgroup2 they are a BPF program.
var controllers = map[string]string{
	"blockIO":        "io",
	"cpu":            "cpu",
	"hugepageLimits": "hugetlb",
	"memory":         "memory",
	"pids":           "pids",
	"rdma":           "rdma",
	// Raw files of any controller; there are too many of them to tell which would be there.
	"unified": "memory",
}

func main() {
	own, err := os.Executable()
	if err != nil {
		fail(err)
	}
	runc := filepath.Join(filepath.Dir(own), "runc")
	there, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	if err != nil {
		fail(err)
	}
	available := strings.Fields(string(there))
	switch subcommand(os.Args[1:]) {
	case "create", "run":
		if err := leaveOut(filepath.Join(bundle(os.Args[1:]), "config.json"), available); err != nil {
			fail(err)
		}
	case "update":
		// What can be updated are limits; one of those whose controllers are missing cannot be set later either.
		if !slices.Contains(available, "cpu") || !slices.Contains(available, "memory") {
			return
		}
	}
	fail(syscall.Exec(runc, append([]string{runc}, os.Args[1:]...), os.Environ()))
}

// The first word that is neither an option nor the value of one: runc's global options that take a value.
func subcommand(args []string) string {
	for i := 0; i < len(args); i++ {
		switch args[i] {
		case "--root", "--log", "--log-format", "--rootless":
			i++
		default:
			if !strings.HasPrefix(args[i], "-") {
				return args[i]
			}
		}
	}
	return ""
}

// The folder of the container to be; runc's default is the current one.
func bundle(args []string) string {
	for i, arg := range args {
		if (arg == "--bundle" || arg == "-b") && i+1 < len(args) {
			return args[i+1]
		}
		if value, found := strings.CutPrefix(arg, "--bundle="); found {
			return value
		}
	}
	return "."
}

func leaveOut(file string, available []string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	// Numbers stay as they are written: a limit may be larger than a float can tell exactly.
	var spec map[string]any
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	if err := decoder.Decode(&spec); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	linux, _ := spec["linux"].(map[string]any)
	resources, _ := linux["resources"].(map[string]any)
	for part, controller := range controllers {
		if !slices.Contains(available, controller) {
			delete(resources, part)
		}
	}
	if text, err = json.Marshal(spec); err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o600)
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "runc-partial:", err)
	os.Exit(1)
}
