//! What the status says of BackendTLSPolicies, and that it waits for the ConfigMaps that they refer to.

use k8s_openapi::api::core::v1::ConfigMap;

use super::*;
use crate::kubernetes::Untold;
use crate::model::ObjectRef;

const SHOP: &str = "
{kind: Service, metadata: {name: pay, namespace: shop}, spec: {clusterIP: 10.0.0.1, ports: [{name: https, port: 443}]}}
---
{kind: Service, metadata: {name: bad, namespace: shop}, spec: {clusterIP: 10.0.0.2, ports: [{name: https, port: 443}]}}
---
kind: BackendTLSPolicy
apiVersion: gateway.networking.k8s.io/v1
metadata: {name: pay, namespace: shop, generation: 1, resourceVersion: '5'}
spec:
  targetRefs: [{group: '', kind: Service, name: pay}, {group: a.test, kind: Backend, name: b}]
  validation: {hostname: pay.test, caCertificateRefs: [{group: '', kind: ConfigMap, name: ca}]}
---
kind: BackendTLSPolicy
apiVersion: gateway.networking.k8s.io/v1alpha3
metadata: {name: bad, namespace: shop, generation: 1, resourceVersion: '5'}
spec:
  targetRefs: [{group: '', kind: Service, name: bad}]
  validation: {hostname: pay.test, wellKnownCACertificates: Ours}
";

#[test]
fn certificates_that_are_not_there_are_told_of_once_the_api_server_has_said_so() {
    let mut world = world_of(SHOP);
    assert_eq!(writes(&mut world), []);
    let ca = ObjectRef::new("shop", "ca");
    assert_eq!(world.config_maps().iter().collect::<Vec<_>>(), [&ca]);
    world.take_config_map(ca.clone(), Ok(None));
    check(
        &mut world,
        &expect![[r#"
        BackendTLSPolicy shop/bad at bad:
          not Accepted: Invalid: spec.validation.wellKnownCACertificates: expected System, found "Ours"; until then requests to what it is for are answered with an error
        BackendTLSPolicy shop/pay at pay:
          not Accepted: NoValidCACertificate: spec.validation.caCertificateRefs[0].name: there is no ConfigMap shop/ca
          not ResolvedRefs: InvalidCACertificateRef: spec.validation.caCertificateRefs[0].name: there is no ConfigMap shop/ca
    "#]],
    );
    // While the API server does not tell, what is known holds.
    world.take_config_map(ca.clone(), Err(Untold));
    assert_eq!(writes(&mut world), []);
    let key = rcgen::KeyPair::generate().unwrap();
    let pem = rcgen::CertificateParams::default().self_signed(&key).unwrap().pem();
    let data = [("ca.crt".to_owned(), pem)].into();
    let metadata = kube::core::ObjectMeta {
        name: Some("ca".into()),
        namespace: Some("shop".into()),
        ..Default::default()
    };
    world.take_config_map(ca, Ok(Some(ConfigMap { metadata, data: Some(data), ..Default::default() })));
    check(
        &mut world,
        &expect![[r#"
        BackendTLSPolicy shop/pay at pay: Accepted ResolvedRefs
    "#]],
    );
}
