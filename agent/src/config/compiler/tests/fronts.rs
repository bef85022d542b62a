//! Who asks for the Services of dialled pods, and which these are.

use super::*;

#[test]
fn the_service_of_a_dialled_pod_is_known_while_a_client_of_this_node_asks_for_it() {
    let client = |node: &str, marks: &str| {
        format!(
            "{{kind: Pod, metadata: {{name: client, namespace: shop, annotations: {{{marks}}}}}, spec: {{nodeName: {node}, containers: []}}}}"
        )
    };
    let asks = "undermesh.io/dialled-pods: service";
    fn front(world: &World, endpoint: &str) -> String {
        let snapshot = world.compiler.snapshot();
        let front = snapshot.front(endpoint.parse().unwrap());
        front.map_or("-".into(), |front| format!("{} {}", front.service, front.port))
    }
    let mut world = World::of(SHOP);
    for (client, expected) in [
        (client("node-1", ""), "-"),
        (client("node-1", asks), "shop/web 80"),
        (client("node-2", asks), "-"),
        (client("node-1", asks), "shop/web 80"),
        (client("node-1", "undermesh.io/dialled-pods: pod"), "-"),
        // As its namespace says.
        (SHOP.replace("enabled}", &format!("enabled}}, annotations: {{{asks}}}")), "shop/web 80"),
    ] {
        world.put(&client);
        assert_eq!(front(&world, "10.1.0.1:8080"), expected, "{client}");
    }
    world.put(&format!("{SHOP}\n---\n{}", client("node-1", asks)));
    assert_eq!(front(&world, "[fd01::1]:8080"), "shop/web 80");
    assert_eq!(front(&world, "10.1.0.1:8081"), "-", "no endpoint's port");
    // The first by name, and by port; the other namespace's has handwritten endpoints.
    let service = |namespace: &str, selector: &str| {
        format!(
            "{{kind: Service, metadata: {{name: also, namespace: {namespace}}}, spec: {{clusterIPs: [10.0.9.{}], {selector}\
             ports: [{{name: b, port: 90, targetPort: 8080}}, {{name: a, port: 81, targetPort: 8080}}]}}}}",
            namespace.len()
        )
    };
    let slice = "{kind: EndpointSlice, metadata: {name: s, namespace: a, labels: {kubernetes.io/service-name: also}}, addressType: IPv4, \
                 ports: [{name: b, port: 8080}], endpoints: [{addresses: [10.1.0.1]}]}";
    world.put(&format!("{}\n---\n{slice}", service("a", "")));
    assert_eq!(front(&world, "10.1.0.1:8080"), "shop/web 80");
    world.put(&service("shop", "selector: {app: web}, "));
    assert_eq!(front(&world, "10.1.0.1:8080"), "shop/also 81");
    world.remove(Kind::Service, "shop", "also");
    assert_eq!(front(&world, "10.1.0.1:8080"), "shop/web 80");
    world.remove(Kind::Pod, "shop", "web-1");
    assert_eq!(front(&world, "10.1.0.1:8080"), "-");
    world.remove(Kind::Pod, "shop", "client");
    assert!(world.compiler.snapshot().fronts.is_empty());
}
