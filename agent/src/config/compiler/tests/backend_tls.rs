//! BackendTLSPolicies and the ConfigMaps that they refer to, in whichever order they come: what is done with requests, and what the
//! status says.

use super::*;
use crate::config::resolve::Refusal;
use crate::model::Authorities;

const SERVICE: &str = "
kind: Service
metadata: {name: pay, namespace: shop}
spec: {clusterIP: 10.0.0.1, ports: [{name: https, port: 443}, {name: admin, port: 8443}]}
";

/// For the Service `pay`, or a port of it; of the day of January.
fn policy(name: &str, day: u32, section: &str, validation: &str) -> String {
    format!(
        "{{kind: BackendTLSPolicy, metadata: {{name: {name}, namespace: shop, creationTimestamp: 2026-01-{day:02}T00:00:00Z}}, spec: {{
           targetRefs: [{{group: '', kind: Service, name: pay{section}}}], validation: {{{validation}}}}}}}"
    )
}

/// By these ConfigMaps.
fn by(config_maps: &[&str]) -> String {
    let refs = config_maps.iter().map(|name| format!("{{group: '', kind: ConfigMap, name: {name}}}"));
    format!("hostname: pay.test, caCertificateRefs: [{}]", refs.collect::<Vec<_>>().join(", "))
}

fn config_map(name: &str, text: &str) -> String {
    let value = serde_json::json!({ "kind": "ConfigMap", "metadata": { "name": name, "namespace": "shop" },
        "data": { "ca.crt": text } });
    value.to_string()
}

fn authority() -> String {
    let key = rcgen::KeyPair::generate().unwrap();
    rcgen::CertificateParams::default().self_signed(&key).unwrap().pem()
}

impl World {
    /// How the ports' requests are sent, what is wrong, and how the policies stand.
    fn tls(&self) -> String {
        let mut lines = String::new();
        let snapshot = self.compiler.snapshot();
        for port in snapshot.services.values().flat_map(|service| &service.ports) {
            let how = match &port.traffic.tls {
                None => "plaintext".to_owned(),
                Some(Err(why)) => format!("refused: {why}"),
                Some(Ok(tls)) => match &tls.authorities {
                    Authorities::System => format!("{} by the system", tls.hostname),
                    Authorities::Given(certificates) => {
                        format!("{} by {} certificates", tls.hostname, certificates.len())
                    }
                },
            };
            writeln!(lines, "{}: {how}", port.port).unwrap();
        }
        for (key, problem) in
            self.compiler.problems().iter().flat_map(|(key, all)| all.iter().map(move |it| (key, it)))
        {
            writeln!(lines, "! {}: {problem}", key.name).unwrap();
        }
        for name in ["a", "b"] {
            let key = Key { kind: Kind::BackendTlsPolicy, namespace: "shop".into(), name: name.into() };
            for status in self.compiler.policy_statuses(&key) {
                let shown = |outcome: &Result<(), Refusal>| match outcome {
                    Ok(()) => "yes",
                    Err(Refusal { reason, .. }) => reason.as_str(),
                };
                let resolved = status.resolved_refs.as_ref().map_or("unsaid", shown);
                writeln!(lines, "{name} accepted: {}, resolved: {resolved}", shown(&status.accepted))
                    .unwrap();
            }
        }
        lines
    }
}

#[test]
fn without_certificates_nothing_is_sent() {
    let mut world = World::of(SERVICE);
    let check = |world: &World, expected: Expect| expected.assert_eq(&world.tls());
    let is_captured =
        |world: &World| world.compiler.snapshot().captured.contains(&IpAddr::from([10, 0, 0, 1]));
    assert!(!is_captured(&world));
    assert!(world.put(&policy("a", 1, ", sectionName: https", &by(&["ca"]))));
    assert!(is_captured(&world), "requests must not pass by");
    assert_eq!(world.compiler.config_maps(), BTreeSet::from([ObjectRef::new("shop", "ca")]));
    check(
        &world,
        expect![[r#"
        443: refused: BackendTLSPolicy shop/a: spec.validation.caCertificateRefs[0].name: there is no ConfigMap shop/ca
        8443: plaintext
        ! a: spec.validation.caCertificateRefs[0].name: there is no ConfigMap shop/ca
        a accepted: NoValidCACertificate, resolved: InvalidCACertificateRef
    "#]],
    );
    assert!(world.put(&config_map("ca", &authority())));
    check(
        &world,
        expect![[r#"
        443: pay.test by 1 certificates
        8443: plaintext
        a accepted: yes, resolved: yes
    "#]],
    );
    // Two of them, of which one can be used.
    let both = authority() + &authority();
    assert!(world.put(&config_map("ca", &both)));
    world.put(&policy("a", 1, ", sectionName: https", &by(&["none", "ca"])));
    check(
        &world,
        expect![[r#"
        443: pay.test by 2 certificates
        8443: plaintext
        ! a: spec.validation.caCertificateRefs[0].name: there is no ConfigMap shop/none
        a accepted: yes, resolved: InvalidCACertificateRef
    "#]],
    );
    assert!(world.put(&config_map("ca", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")));
    check(
        &world,
        expect![[r#"
        443: refused: BackendTLSPolicy shop/a: spec.validation.caCertificateRefs[0].name: there is no ConfigMap shop/none
        8443: plaintext
        ! a: spec.validation.caCertificateRefs[0].name: there is no ConfigMap shop/none
        ! a: spec.validation.caCertificateRefs[1].name: of the ConfigMap shop/ca nothing can be used: certificate 1 under its ca.crt cannot be used: TrailingData(SignedData)
        a accepted: NoValidCACertificate, resolved: InvalidCACertificateRef
    "#]],
    );
    assert!(!world.put(&config_map("other", &both)), "nobody refers to it");
    world.put(&policy(
        "a",
        1,
        ", sectionName: https",
        "hostname: pay.test, caCertificateRefs: [{group: '', kind: Secret, name: ca}]",
    ));
    check(
        &world,
        expect![[r#"
        443: refused: BackendTLSPolicy shop/a: spec.validation.caCertificateRefs[0].kind: expected a ConfigMap (group ""), found the kind "Secret" of the group ""
        8443: plaintext
        ! a: spec.validation.caCertificateRefs[0].kind: expected a ConfigMap (group ""), found the kind "Secret" of the group ""
        a accepted: NoValidCACertificate, resolved: InvalidKind
    "#]],
    );
    world.put(&policy("a", 1, ", sectionName: https", "hostname: pay.test, wellKnownCACertificates: System"));
    assert!(world.compiler.config_maps().is_empty());
    check(
        &world,
        expect![[r#"
        443: pay.test by the system
        8443: plaintext
        a accepted: yes, resolved: yes
    "#]],
    );
    // Whatever held before.
    world.put(&policy("a", 1, ", sectionName: https", "hostname: 10.0.0.1, wellKnownCACertificates: System"));
    check(
        &world,
        expect![[r#"
        443: refused: BackendTLSPolicy shop/a says something that cannot be used
        8443: plaintext
        ! a: this version cannot be used: until one can, requests to what it is for are answered with an error
        a accepted: yes, resolved: yes
    "#]],
    );
    assert!(world.remove(Kind::BackendTlsPolicy, "shop", "a"));
    check(
        &world,
        expect![[r#"
        443: plaintext
        8443: plaintext
    "#]],
    );
    assert!(!is_captured(&world));
}

#[test]
fn of_several_policies_one_has_the_port() {
    let mut world = World::of(SERVICE);
    let system = "hostname: a.test, wellKnownCACertificates: System";
    world.put(&policy("a", 2, "", system));
    world.put(&policy("b", 1, "", &system.replace("a.test", "b.test")));
    expect![[r#"
        443: b.test by the system
        8443: b.test by the system
        ! a: spec.targetRefs[0]: the port 443 goes by BackendTLSPolicy shop/b, which is older; the port 8443 goes by BackendTLSPolicy shop/b, which is older
        a accepted: Conflicted, resolved: yes
        b accepted: yes, resolved: yes
    "#]].assert_eq(&world.tls());
    // Who names the port comes before who is older.
    world.put(&policy("a", 2, ", sectionName: https", system));
    expect![[r#"
        443: a.test by the system
        8443: b.test by the system
        a accepted: yes, resolved: yes
        b accepted: yes, resolved: yes
    "#]]
    .assert_eq(&world.tls());
    world.put(&policy("b", 1, ", sectionName: nothing", &system.replace("a.test", "b.test")));
    expect![[r#"
        443: a.test by the system
        8443: plaintext
        ! b: spec.targetRefs[0].sectionName: the Service shop/pay has no TCP port named "nothing"
        a accepted: yes, resolved: yes
        b accepted: TargetNotFound, resolved: yes
    "#]]
    .assert_eq(&world.tls());
}
