package kmstest

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Access is what lets a role use keys, for [KMS.Enforce]. It is the part of IAM that our policies need.
// https://docs.aws.amazon.com/kms/latest/developerguide/policy-evaluation.html
type Access struct {
	Role     []*Policy          // of the role
	Keys     map[string]*Policy // by key ARN; a key that is not there has the default: the account's IAM policies decide
	Grants   []Grant
	Endpoint *Policy             // of the VPC endpoint that requests come through, nil without one
	Control  []*Policy           // of the organization
	Context  map[string][]string // condition keys of every request, beside those of the principal and of KMS
}

// Grant lets a role use a key.
type Grant struct {
	Key, Grantee string   // ARNs
	Operations   []string // as in CreateGrant: "Decrypt"
}

// RoleARN is the role that every request is made as.
const RoleARN = "arn:aws:iam::" + Account + ":role/" + Role

// Request is one thing that a principal wants.
type Request struct {
	Principal string // ARN
	Action    string // "kms:Decrypt"
	Resource  string // ARN
	Context   map[string][]string
}

// Enforce makes KMS refuse what is not allowed, as AWS would; nil allows everything.
func (k *KMS) Enforce(a *Access) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.access = a
}

// authorize asks the policies about one permission.
func (k *KMS) authorize(action string, key *key, context map[string]string) *apiError {
	if k.access == nil {
		return nil
	}
	r := Request{Principal: RoleARN, Action: "kms:" + action, Resource: key.arn, Context: map[string][]string{}}
	for name := range context {
		r.Context["kms:EncryptionContextKeys"] = append(r.Context["kms:EncryptionContextKeys"], name)
	}
	if k.access.Allows(r) {
		return nil
	}
	return refuse("AccessDeniedException", "User: arn:aws:sts::%s:assumed-role/%s/%s is not authorized to perform: %s on resource: %s", Account, Role, InstanceID, r.Action, key.arn)
}

// Allows tells what AWS would: a denial beats all; the endpoint has to allow; then the key's policy, or a grant, or the role's policy where the key's
// leaves it to the account.
func (a *Access) Allows(r Request) bool {
	context := map[string][]string{"aws:PrincipalArn": {r.Principal}}
	maps.Copy(context, a.Context)
	maps.Copy(context, r.Context)
	r.Context = context
	onKey := a.Keys[r.Resource]
	if onKey == nil {
		onKey = &Policy{Statements: []Statement{{Principal: []string{account}, Action: []string{"kms:*"}, Resource: []string{"*"}}}}
	}
	for _, p := range slices.Concat(a.Role, a.Control, []*Policy{onKey, a.Endpoint}) {
		if p != nil && p.says(r, true, r.Principal) {
			return false
		}
	}
	if a.Endpoint != nil && !a.Endpoint.says(r, false, r.Principal) {
		return false
	}
	if onKey.says(r, false, r.Principal) {
		return true
	}
	if slices.ContainsFunc(a.Grants, func(g Grant) bool {
		return g.Key == r.Resource && g.Grantee == r.Principal && slices.Contains(g.Operations, strings.TrimPrefix(r.Action, "kms:"))
	}) {
		return true
	}
	return onKey.says(r, false, account) && slices.ContainsFunc(a.Role, func(p *Policy) bool { return p.says(r, false, "") })
}

// account as a principal: whoever the account's IAM policies allow.
const account = "arn:aws:iam::" + Account + ":root"

// says tells whether a statement of the policy with that effect is about the request, made as a principal.
func (p *Policy) says(r Request, deny bool, as string) bool {
	return slices.ContainsFunc(p.Statements, func(s Statement) bool {
		return s.Deny == deny && s.isAbout(as) &&
			slices.ContainsFunc(s.Action, func(a string) bool { return like(a, r.Action) }) &&
			slices.ContainsFunc(s.Resource, func(x string) bool { return like(x, r.Resource) }) &&
			s.conditionsHold(r)
	})
}

// isAbout: a statement without a principal is about whoever it is attached to.
func (s Statement) isAbout(principal string) bool {
	return s.Principal == nil || slices.Contains(s.Principal, "*") || slices.Contains(s.Principal, principal)
}

func (s Statement) conditionsHold(r Request) bool {
	for name, keys := range s.Condition {
		all, compare, _ := operator(name)
		for key, wanted := range keys {
			values, there := r.Context[key]
			if name == "Null" {
				if there == (wanted[0] == "true") {
					return false
				}
				continue
			}
			wanted = resolve(wanted, r.Context)
			negated := strings.Contains(name, "Not")
			// Without "Not": one of the wanted; with it: none of them.
			holds := func(v string) bool {
				return slices.ContainsFunc(wanted, func(w string) bool { return compare(w, v) }) != negated
			}
			switch {
			case !there && (all || negated):
			case !there:
				return false
			case slices.ContainsFunc(values, func(v string) bool { return !holds(v) }):
				return false
			}
		}
	}
	return true
}

// resolve puts in what policy variables stand for. A value with one that the request does not have matches nothing.
func resolve(values []string, context map[string][]string) []string {
	var out []string
	for _, v := range values {
		known := true
		v = variable.ReplaceAllStringFunc(v, func(name string) string {
			c := context[strings.Trim(name, "${}")]
			if len(c) != 1 {
				known = false
				return ""
			}
			return c[0]
		})
		if known {
			out = append(out, v)
		}
	}
	return out
}

// operator takes the name of a condition's operator apart.
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_condition_operators.html
func operator(name string) (all bool, compare func(wanted, got string) bool, ok bool) {
	name, all = strings.CutPrefix(name, "ForAllValues:")
	equal := func(wanted, got string) bool { return wanted == got }
	compare, ok = map[string]func(wanted, got string) bool{
		"StringEquals": equal, "StringNotEquals": equal, "ArnEquals": like, "ArnNotEquals": like, "NumericLessThan": less, "Null": equal,
	}[name]
	return all, compare, ok
}

func less(wanted, got string) bool {
	w, errW := strconv.ParseFloat(wanted, 64)
	g, errG := strconv.ParseFloat(got, 64)
	return errW == nil && errG == nil && g < w
}
