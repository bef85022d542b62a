// Program conformance runs the Gateway API's own conformance tests for meshes against the cluster of KUBECONFIG, with every
// feature declared that Undermesh supports. Its flags are those of the suite and of `go test`. It installs nothing.
//
// With the word `images` it only prints which images the suite's pods run.
package main

import (
	"fmt"
	"log"
	"os"
	"regexp"
	"slices"
	"testing"

	"sigs.k8s.io/gateway-api/conformance"
	confv1 "sigs.k8s.io/gateway-api/conformance/apis/v1"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/gateway-api/pkg/features"
)

func main() {
	if slices.Equal(os.Args[1:], []string{"images"}) {
		printImages()
		return
	}
	tests := []testing.InternalTest{{Name: "Conformance", F: run}}
	testing.Main(regexp.MatchString, tests, nil, nil)
}

func printImages() {
	manifests, err := conformance.Manifests.ReadFile("mesh/manifests.yaml")
	if err != nil {
		log.Fatal(err)
	}
	var images []string
	for _, found := range regexp.MustCompile(`(?m)^\s*image: (\S+)$`).FindAllSubmatch(manifests, -1) {
		images = append(images, string(found[1]))
	}
	slices.Sort(images)
	for _, image := range slices.Compact(images) {
		fmt.Println(image)
	}
}

func run(t *testing.T) {
	options := conformance.DefaultOptions(t)
	options.ConformanceProfiles = []suite.ConformanceProfileName{
		suite.MeshHTTPConformanceProfileName,
		suite.MeshGRPCConformanceProfileName,
	}
	options.SupportedFeatures = supported()
	options.NamespaceLabels = map[string]string{"undermesh.io/mesh": "enabled"}
	// The version is the caller's to know. There is no public place to point to.
	options.Implementation = confv1.Implementation{
		Organization: "undermesh",
		Project:      "undermesh",
		URL:          "https://undermesh.invalid",
		Version:      options.Implementation.Version,
		Contact:      []string{"https://undermesh.invalid"},
	}
	conformance.RunConformanceWithOptions(t, options)
}

// Every extended feature of a mesh, and of those of routes the ones that tests of meshes ask for.
func supported() []features.FeatureName {
	names := features.SetsToNamesSet(features.MeshExtendedFeatures).UnsortedList()
	names = append(names,
		features.SupportHTTPRouteParentRefPort,
		features.SupportHTTPRouteResponseHeaderModification,
		features.SupportHTTPRoute303RedirectStatusCode,
		features.SupportHTTPRoute307RedirectStatusCode,
		features.SupportHTTPRoute308RedirectStatusCode,
	)
	slices.Sort(names)
	return names
}
